"""What goes wrong between us and Stripe, and what a customer hears of it.

StripeFailed              a call to Stripe did not do what it was for
├── StripeNotReached      nothing was sent: it has not happened
├── StripeOutcomeUnknown  sent, and no answer, or a server's error: it may have happened
├── StripeThrottled       refused for its rate: it has not happened, and may later
├── StripeRefused         refused for what it is: it has not happened, and will not
└── StripeKeyRejected     our key is wrong, or may not do that

AppError
├── Unavailable
│   ├── BillingUnavailable     Stripe cannot be reached
│   ├── BillingMisconfigured   Stripe refuses what we ask
│   └── BillingNotConfigured   the operator has set no Stripe key
├── NotFound
│   └── SubscriptionNotFound
├── Invalid
│   ├── AutomaticTopUpInvalid
│   ├── PlanUnknown
│   ├── PlanNotForSale
│   ├── ReturnAddressInvalid
│   └── TopUpInvalid
├── Conflict
│   ├── AlreadySubscribed
│   └── NotSubscribed
└── PaymentRequired
    └── PaymentRefused         the card was declined
"""

from __future__ import annotations

from core.errors import Conflict, Invalid, NotFound, PaymentRequired, Unavailable


class StripeFailed(Exception):
    """A call to Stripe did not do what it was for. The text is for our logs: Stripe's may name a customer."""


class StripeNotReached(StripeFailed):
    """No connection was made, so nothing was sent."""


class StripeOutcomeUnknown(StripeFailed):
    """The request was sent, and what became of it is not known: no answer, a broken one, or a 5xx."""


class StripeThrottled(StripeFailed):
    """Too many requests, or one at a time for this customer and meter. Nothing was done."""

    def __init__(self, message: str, *, is_lock: bool) -> None:
        super().__init__(message)
        self.is_lock = is_lock
        """Whether only this object was busy; else everything is to go slower."""


class StripeKeyRejected(StripeFailed):
    """The API key is unknown, or may not do that."""


class StripeRefused(StripeFailed):
    """The request is wrong as it stands. *code* and *param* are Stripe's."""

    def __init__(self, message: str, *, code: str | None, param: str | None, status: int) -> None:
        super().__init__(message)
        self.code = code
        self.param = param
        self.status = status

    @property
    def is_duplicate(self) -> bool:
        """Whether Stripe has this identifier already: what was to be told, it knows (langfuse/langfuse#16292)."""
        is_named = self.code in {"duplicate_meter_event", "resource_already_exists"}
        return self.status == 400 and (is_named or "already exists with identifier" in str(self))

    @property
    def is_missing(self) -> bool:
        """Whether there is no such object."""
        return self.status == 404 or self.code == "resource_missing"


class BillingUnavailable(Unavailable):
    """Stripe cannot be reached; nothing was changed, or it will be seen later."""

    code = "billing_unavailable"

    def __init__(self) -> None:
        super().__init__("Billing is temporarily unavailable. Please try again.", retry_after_seconds=5)


class BillingNotConfigured(Unavailable):
    """The operator has not connected this gateway to Stripe."""

    code = "billing_not_configured"

    def __init__(self) -> None:
        super().__init__("Billing is not set up on this gateway. Please ask its operator.")


class BillingMisconfigured(Unavailable):
    """Stripe refuses what we ask, and will again: an operator has to look. Trying again does not help."""

    code = "billing_misconfigured"

    def __init__(self) -> None:
        super().__init__("Billing does not work on this gateway just now. Please ask its operator.")


class SubscriptionNotFound(NotFound):
    """The organization never had a subscription."""

    code = "not_subscribed"

    def __init__(self) -> None:
        super().__init__("This organization has no subscription.")


class AutomaticTopUpInvalid(Invalid):
    """One of the two is missing."""

    code = "automatic_top_up_invalid"

    def __init__(self, param: str) -> None:
        super().__init__("Give both 'below_cents' and 'amount_cents', or null for both.", param=param)


class PlanUnknown(Invalid):
    """No plan has that name."""

    code = "plan_unknown"

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no plan named '{name[:64]}'.", param="plan")


class PlanNotForSale(Invalid):
    """The plan has no price at Stripe: it is free, or by agreement, or `aap stripe sync` has not been run."""

    code = "plan_not_for_sale"

    def __init__(self, name: str) -> None:
        super().__init__(f"The plan '{name[:64]}' cannot be bought here.", param="plan")


class ReturnAddressInvalid(Invalid):
    """The address to come back to is none that a browser should be sent to."""

    code = "return_url_invalid"

    def __init__(self, param: str) -> None:
        super().__init__(f"Invalid '{param}': expected an http:// or https:// address.", param=param)


class TopUpInvalid(Invalid):
    """The amount cannot be bought."""

    code = "top_up_invalid"

    def __init__(self, low_cents: int, high_cents: int) -> None:
        super().__init__(
            f"Invalid 'amount_cents': expected a whole number from {low_cents} to {high_cents}.", param="amount_cents"
        )


class AlreadySubscribed(Conflict):
    """The organization has a subscription: it is changed, not bought again."""

    code = "already_subscribed"

    def __init__(self) -> None:
        super().__init__("This organization is subscribed already. Change its subscription instead.")


class NotSubscribed(Conflict):
    """The organization has no subscription that could be changed."""

    code = "not_subscribed"

    def __init__(self) -> None:
        super().__init__("This organization has no subscription.")


class PaymentRefused(PaymentRequired):
    """The card was declined, or needs its owner to be there."""

    code = "payment_declined"

    def __init__(self) -> None:
        super().__init__("The payment was declined. Please update your payment method.")
