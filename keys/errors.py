"""What can go wrong when somebody calls.

AppError
├── Unauthenticated
│   ├── KeyMissing      no credential was sent
│   └── KeyIncorrect    malformed, unknown, expired or revoked
├── Forbidden
│   ├── AddressNotAllowed   the key does not work from this address
│   ├── ModelNotAllowed     the key may not use this model
│   └── ScopeMissing        the key may not do this
├── Invalid
│   ├── BudgetInvalid       a limit that is none
│   └── RequestTooLarge     can never fit into a token limit
├── Conflict
│   └── KeyRevoked          a revoked key stays revoked
├── NotFound
│   └── TenantNotFound      no such organization, project or key of yours
├── PaymentRequired
│   ├── BudgetExhausted         the most that the call can cost does not fit into a hard budget
│   ├── OrganizationSuspended   the whole organization may make no new calls
│   └── PlanLimitReached        the month's allowance of the organization's plan is used up
├── RateLimited
│   ├── RateLimitReached    a limit on requests, tokens or concurrency
│   └── TooManyFailures     too many wrong keys from one address
└── Unavailable
    ├── AuthenticationUnavailable   nobody can tell who is calling just now
    └── QuotaUnverifiable           nobody can tell what a hard budget has left just now
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from core.errors import (
    Conflict,
    Forbidden,
    Invalid,
    NotFound,
    PaymentRequired,
    RateLimited,
    Unauthenticated,
    Unavailable,
)
from core.money import usd_text


class KeyMissing(Unauthenticated):
    """No credential was sent."""

    def __init__(self) -> None:
        super().__init__(
            "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer "
            "auth (i.e. Authorization: Bearer YOUR_KEY)."
        )


class KeyIncorrect(Unauthenticated):
    """The key is malformed, unknown, expired or revoked. The reason is told only to who holds the secret."""

    code = "invalid_api_key"

    def __init__(self, hint: str, reason: str = "") -> None:
        super().__init__(f"Incorrect API key provided: {hint}.{' ' + reason if reason else ''}")


class AddressNotAllowed(Forbidden):
    """The key is right, and does not work from this address."""

    code = "ip_not_authorized"

    def __init__(self) -> None:
        super().__init__("This API key may not be used from your IP address.")


class ModelNotAllowed(Forbidden):
    """The key may not use this model."""

    code = "model_not_allowed"

    def __init__(self, model: str) -> None:
        super().__init__(f"This API key does not have access to model `{model}`.", param="model")


class ScopeMissing(Forbidden):
    """The key may not do this."""

    code = "insufficient_permissions"

    def __init__(self, scope: str) -> None:
        super().__init__(f"You have insufficient permissions for this operation. Missing scopes: {scope}.")


class RequestTooLarge(Invalid):
    """The prompt alone is larger than a limit of tokens: no waiting helps."""

    code = "request_too_large"

    def __init__(self, *, scope: str, limit_tokens: int, requested_tokens: int) -> None:
        super().__init__(
            f"Request too large: it needs about {requested_tokens} tokens, and the {scope} limit is {limit_tokens}. "
            "Shorten the input, or have the limit raised."
        )


class KeyRevoked(Conflict):
    """A revoked key stays revoked: make a new one."""

    code = "key_revoked"

    def __init__(self) -> None:
        super().__init__("This API key is revoked. Create a new one.")


class TenantNotFound(NotFound):
    """No such organization, project or key, or not yours: the answer is the same."""

    def __init__(self, what: str) -> None:
        super().__init__(f"No such {what}.")


class RateLimitReached(RateLimited):
    """A limit is reached. *dimension* and *scope* say which one; *retry_after_seconds* when there is room again."""

    code = "rate_limit_exceeded"

    def __init__(self, *, scope: str, dimension: str, limit: int, retry_after_seconds: float) -> None:
        words = dimension.replace("_", " ")
        super().__init__(
            f"Rate limit reached for this {scope}: limit of {limit} {words}. "
            f"Please try again in {retry_after_seconds:.3g}s.",
            param=f"{scope}.{dimension}",
            retry_after_seconds=retry_after_seconds,
        )
        self.scope = scope
        self.dimension = dimension
        self.limit = limit
        self.shown: list[int] | None = None
        """The tightest limits, for the caller's headers: see `keys.limits.window_of`."""

    def again(self, retry_after_seconds: float) -> RateLimitReached:
        """Return the same denial with the wait that is left."""
        error = RateLimitReached(
            scope=self.scope, dimension=self.dimension, limit=self.limit, retry_after_seconds=retry_after_seconds
        )
        error.shown = self.shown
        return error


class TooManyFailures(RateLimited):
    """One address sent too many wrong keys."""

    code = "too_many_failed_authentications"

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(
            "Too many requests with incorrect API keys from your address.", retry_after_seconds=retry_after_seconds
        )


class AuthenticationUnavailable(Unavailable):
    """The key store is down and the local cache cannot be trusted: refused, never guessed."""

    code = "authentication_unavailable"

    def __init__(self) -> None:
        super().__init__("API keys cannot be checked just now. Please try again.", retry_after_seconds=1)


class BudgetExhausted(PaymentRequired):
    """The most that the call can cost does not fit into what a hard budget has left."""

    code = "budget_exhausted"

    def __init__(self, scope: str, period: str, left: int, needed: int, ends_at: datetime | None) -> None:
        if scope == "credit":
            name, more = "the organization's prepaid credit", " More can be bought at any time."
        else:
            name, more = f"the {scope}'s {'budget' if period == 'total' else f'budget of this {period}'}", ""
        until = f" It is renewed at {ends_at:%Y-%m-%dT%H:%M:%SZ}." if ends_at else ""
        if left > 0:
            message = (
                f"This request may cost up to ${usd_text(needed)}, and {name} has ${usd_text(left)} left. Shorten it, "
                f"or set a smaller max_completion_tokens.{until}"
            )
        else:
            message = f"You have used up {name}.{until}{more}"
        super().__init__(message, param=f"{scope}.budget.{period}")


# What is told of why an organization is suspended, and of what its people can do. Other reasons are the operator's.
SUSPENSION_REASONS: Final = {
    "payment_failed": ("a payment has failed", "Pay the open invoice or change the payment method to go on."),
    "subscription_ended": ("its subscription has ended", "Subscribe to a plan to go on."),
    "subscription_paused": ("its subscription is paused", "Resume the subscription to go on."),
}
BILLING_PREFIX: Final = "billing:"
"""Before a reason that billing has, and takes back by itself. What an operator gives stays."""
_SUSPENDED_BY_OPERATOR: Final = ("the operator of this service has stopped it", "Ask them to resume it.")


class OrganizationSuspended(PaymentRequired):
    """The whole organization may make no new calls. Reading what it used, and paying, works."""

    code = "organization_suspended"

    def __init__(self, reason: str | None) -> None:
        why, remedy = SUSPENSION_REASONS.get((reason or "").removeprefix(BILLING_PREFIX), _SUSPENDED_BY_OPERATOR)
        super().__init__(f"This organization is suspended: {why}. {remedy}")


class PlanLimitReached(PaymentRequired):
    """The month's allowance of the plan has no room for the call; no retry helps before it is renewed."""

    code = "plan_limit_reached"

    def __init__(self, unit: str, limit: int, left: int, needed: int, renews_at: datetime) -> None:
        words = unit.replace("_", " ")
        renewed = f"It is renewed at {renews_at:%Y-%m-%dT%H:%M:%SZ}; a larger plan takes effect at once."
        if left > 0:
            message = (
                f"This request may take up to {needed} {words}, and your plan has {left} of {limit} left this month. "
                f"Shorten it, or set a smaller max_completion_tokens. {renewed}"
            )
        else:
            message = f"You have used up your plan's limit of {limit} {words} a month. {renewed}"
        super().__init__(message, param=f"organization.plan.{unit}_per_month")


class BudgetInvalid(Invalid):
    """The limit of a budget is negative, or more than can be counted exactly."""

    code = "budget_invalid"

    def __init__(self) -> None:
        super().__init__("A budget is between 0 and 9,000,000 US dollars.")


class QuotaUnverifiable(Unavailable):
    """A hard budget holds, and what is left of it cannot be known just now: refused, never guessed."""

    code = "quota_unverifiable"

    def __init__(self) -> None:
        super().__init__("Your budget cannot be checked just now. Please try again.", retry_after_seconds=1)
