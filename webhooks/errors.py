"""What can go wrong when somebody manages webhooks.

AppError
├── NotFound
│   └── WebhookNotFound        no such endpoint, event or delivery of yours
├── Invalid
│   ├── EndpointUrlInvalid     an address that nothing is sent to, and why
│   ├── EventTypeUnknown
│   ├── FilterInvalid          no JMESPath expression
│   ├── HeaderInvalid          a header that cannot be sent, or is ours
│   └── TooManyDeliveries      more than one act takes
├── Forbidden
│   └── SecretNotRevealable    it was shown when it was made, and is not shown again
├── Conflict
│   ├── EndpointIsDisabled     nothing is sent to it until it is enabled
│   ├── RotationUnderway       the secret before the present one has not ended yet
│   └── TooManyEndpoints
└── Unavailable
    └── WebhooksNotConfigured  the operator has set no sealing key
"""

from __future__ import annotations

from datetime import datetime

from core.errors import Conflict, Forbidden, Invalid, NotFound, Unavailable


class WebhookNotFound(NotFound):
    """No such thing, or not the caller's: both get the same answer."""

    code = "webhook_not_found"

    def __init__(self, what: str) -> None:
        super().__init__(f"No such webhook {what}.")


class EndpointUrlInvalid(Invalid):
    """Nothing is sent to such an address."""

    code = "webhook_url_invalid"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Invalid 'url': {reason}", param="url")


class EventTypeUnknown(Invalid):
    """There is no event of that type."""

    code = "event_type_unknown"

    def __init__(self, name: str, known: str) -> None:
        super().__init__(f"Invalid 'event_types': {name[:64]!r} is none. There are: {known}.", param="event_types")


class FilterInvalid(Invalid):
    """A filter that is no JMESPath expression."""

    code = "filter_invalid"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Invalid 'filter': {reason[:300]}.", param="filter")


class HeaderInvalid(Invalid):
    """A header that cannot be sent, or that is ours to set."""

    code = "header_invalid"

    def __init__(self, reason: str) -> None:
        super().__init__(f"Invalid 'headers': {reason}.", param="headers")


class TooManyDeliveries(Invalid):
    """More deliveries than one act takes on."""

    code = "too_many_deliveries"

    def __init__(self, count_max: int) -> None:
        super().__init__(f"That would be more than {count_max} deliveries, the most at once: choose a shorter time.")


class SecretNotRevealable(Forbidden):
    """The endpoint's secret is shown when it is made, and not again."""

    code = "secret_not_revealable"

    def __init__(self) -> None:
        super().__init__("This endpoint's secret is not shown again. Rotate it to get one that you can see.")


class EndpointIsDisabled(Conflict):
    """Nothing is sent to a disabled endpoint."""

    code = "endpoint_disabled"

    def __init__(self) -> None:
        super().__init__("This endpoint is disabled. Enable it first.")


class RotationUnderway(Conflict):
    """The secret before the present one has not ended yet; a third beside them would be one too many."""

    code = "rotation_underway"

    def __init__(self, ends_at: datetime) -> None:
        super().__init__(
            f"This endpoint's secret was rotated, and the older one works until {ends_at:%Y-%m-%d %H:%M} UTC. "
            "End it first, or wait."
        )


class TooManyEndpoints(Conflict):
    """An organization has as many endpoints as it may."""

    code = "too_many_endpoints"

    def __init__(self, count_max: int) -> None:
        super().__init__(f"An organization has {count_max} webhook endpoints at most.")


class WebhooksNotConfigured(Unavailable):
    """There is no key to seal signing secrets under."""

    code = "webhooks_not_configured"

    def __init__(self) -> None:
        super().__init__("Webhooks are not set up here: the operator has set no AAP_SEALING_KEYS.")
