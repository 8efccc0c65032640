"""Stripe's errors: an HTTP status, a type, a code, the parameter at fault.

StripeError
└── Executed    work was begun, so an idempotency key keeps the answer (a parameter's refusal is not kept)
"""

from __future__ import annotations

from typing import Any, cast

Object = dict[str, Any]


class StripeError(Exception):
    """An answer in Stripe's error form. *should_retry* sets `stripe-should-retry`; None leaves the header out."""

    is_saved = False

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind
        self.should_retry = should_retry
        self.more: Object = {}


class Executed(StripeError):
    """An error of work that was begun: repeating the idempotency key repeats the answer."""

    is_saved = True


def missing(param: str) -> StripeError:
    """Refuse a call that lacks *param*."""
    return StripeError(400, f"Missing required param: {param}.", code="parameter_missing", param=param)


def invalid(param: str, message: str, code: str | None = None) -> StripeError:
    """Refuse the value of *param*."""
    return StripeError(400, message, code=code, param=param)


def not_found(kind: str, identity: str, param: str = "id") -> StripeError:
    """Tell that there is no object of *kind* by that id."""
    name = kind.rsplit(".", 1)[-1].replace("_", " ")
    return StripeError(404, f"No such {name}: '{identity}'", code="resource_missing", param=param)


def body_of(error: StripeError, request_id: str, log_url: str) -> Object:
    """The JSON that Stripe answers for *error*."""
    written: Object = {"type": error.kind, "message": error.message, "request_log_url": f"{log_url}/{request_id}"}
    if error.code:
        written["code"] = error.code
        written["doc_url"] = f"https://stripe.com/docs/error-codes/{error.code.replace('_', '-')}"
    if error.param:
        written["param"] = error.param
    return {"error": written | error.more}


def part(whole: Object | None, *names: str) -> Object:
    """The object below *names*, or an empty one where there is none."""
    for name in names:
        whole = cast("Object | None", (whole or {}).get(name))
    return whole or {}
