"""Idempotency keys: v1 repeats the saved answer, errors included; v2 repeats successes and runs failures again."""

from __future__ import annotations

import msgspec

from metering.billing.twin.errors import StripeError
from metering.billing.twin.wire import Reply

KEY_LENGTH_MAX = 255


class Claim(msgspec.Struct, kw_only=True):
    """A key in use: what was asked with it, when (Unix seconds), and what was answered; None while it is running."""

    fingerprint: str
    at: int
    reply: Reply | None = None


class IdempotencyKeys:
    """The keys of the past *seconds*."""

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._claims: dict[str, Claim] = {}

    def claim(self, key: str, fingerprint: str, now: int) -> Reply | None:
        """Claim *key*, or return what it was answered with.

        Errors: 400 idempotency_error for other parameters, 409 while the first use is running, 400 for a long key.
        """
        if len(key) > KEY_LENGTH_MAX:
            raise StripeError(
                400, f"Idempotency keys have at most {KEY_LENGTH_MAX} characters.", kind="idempotency_error"
            )
        self._forget_old(now)
        held = self._claims.get(key)
        if held is None:
            self._claims[key] = Claim(fingerprint=fingerprint, at=now)
            return None
        if held.fingerprint != fingerprint:
            message = (
                "Keys for idempotent requests can only be used with the same parameters they were first used with. "
                f"Try using a key other than '{key}' if you meant to execute a different request."
            )
            raise StripeError(400, message, kind="idempotency_error")
        if held.reply is None:
            message = f"There is currently another in-progress request using this Idempotent Key: {key}."
            raise StripeError(409, message, code="idempotency_key_in_use", kind="idempotency_error", should_retry=True)
        return held.reply

    def _forget_old(self, now: int) -> None:
        """Forget the keys whose time is over: they are in order of their first use."""
        while self._claims:
            key, oldest = next(iter(self._claims.items()))
            if oldest.reply is None or now - oldest.at < self._seconds:
                return
            del self._claims[key]

    def save(self, key: str, reply: Reply) -> None:
        """Remember what *key* was answered with."""
        self._claims[key].reply = reply

    def release(self, key: str) -> None:
        """Forget *key*: the request was refused before it was begun, or v2 will run it again."""
        self._claims.pop(key, None)
