"""From the options of `aap webhooks` to what they ask for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from msgspec import UNSET

from gateway.cli.common import fail
from webhooks.deliveries import DeliveryFilter
from webhooks.endpoints import EndpointChange, NewEndpoint
from webhooks.resend import Replay


def new_endpoint(url: str, options: Mapping[str, Any]) -> NewEndpoint:
    """Return the endpoint that `create` asks for."""
    return NewEndpoint(
        url=url,
        description=options["description"],
        event_types=options["event_types"] or ("*",),
        filter=options["expression"],
        headers=_headers(options["headers"]),
        requests_per_second=options["rate"],
        is_secret_revealable=not options["no_reveal"],
    )


def endpoint_change(options: Mapping[str, Any]) -> EndpointChange:
    """Return the change that `update` asks for: an empty filter and a rate of 0 take them away."""
    return EndpointChange(
        url=_or_unset(options["url"]),
        description=_or_unset(options["description"]),
        event_types=options["event_types"] or UNSET,
        filter=UNSET if options["expression"] is None else options["expression"] or None,
        headers=_headers(options["headers"]) if options["headers"] else UNSET,
        requests_per_second=UNSET if options["rate"] is None else options["rate"] or None,
    )


def chosen_replay(options: Mapping[str, Any]) -> Replay:
    """Return what `replay` asks for."""
    return Replay(
        since=in_utc(options["since"]),
        until=in_utc(options["until"]) if options["until"] is not None else None,
        event_types=options["event_types"],
        state=options["state"],
    )


def chosen_deliveries(options: Mapping[str, Any]) -> DeliveryFilter:
    """Return what `deliveries` asks for."""
    return DeliveryFilter(endpoint_id=options["endpoint"], event_type=options["event_type"], state=options["state"])


def in_utc(moment: datetime) -> datetime:
    """Return a moment as it was typed, which is in UTC."""
    return moment.replace(tzinfo=UTC)


def _or_unset(value: Any) -> Any:
    return UNSET if value is None else value


def _headers(lines: Sequence[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, separator, value = line.partition(":")
        if not separator:
            # What is on the line may be a credential: it is not repeated.
            fail("a header is written as 'Name: value'")
        headers[name.strip()] = value.strip()
    return headers
