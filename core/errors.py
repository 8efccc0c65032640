"""The nine kinds of things that go wrong. A concrete error lives in its package and subclasses one of these.

AppError
├── Unauthenticated   who is calling is unknown
├── Forbidden         known, and not allowed
├── NotFound          absent, or not the caller's: the answer is the same
├── Invalid           the request cannot be understood or served as it stands
├── Conflict          true, but not now: something else holds it
├── RateLimited       too much in too little time; waiting helps
├── PaymentRequired   an allowance is used up; waiting does not help
├── UpstreamFailed    a provider did not do its part
└── Unavailable       a part of ours is down or full; waiting helps
"""

from __future__ import annotations

from typing import ClassVar


class AppError(Exception):
    """An error whose message may be shown to the caller. Internals go to `add_note` and the log.

    *retry_after_seconds* says when trying again may help; None where nobody knows.
    *param* names the field of the request that is to blame.
    """

    code: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class Unauthenticated(AppError):
    """Who is calling is unknown."""


class Forbidden(AppError):
    """The caller is known, and not allowed."""


class NotFound(AppError):
    """Absent, or not the caller's: both get the same answer."""


class Invalid(AppError):
    """The request cannot be understood, or not served as it stands."""


class Conflict(AppError):
    """Something else holds what the request needs; the same request may succeed later."""


class RateLimited(AppError):
    """Too much in too little time; waiting helps."""


class PaymentRequired(AppError):
    """An allowance is used up; waiting does not help."""


class UpstreamFailed(AppError):
    """A provider did not do its part."""


class Unavailable(AppError):
    """A part of ours is down or full; waiting helps."""
