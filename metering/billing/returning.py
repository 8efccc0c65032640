"""Where a customer's browser comes back to from Stripe's pages."""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

import msgspec

from metering.billing.errors import ReturnAddressInvalid

_LENGTH_MAX: Final = 2_000


class ReturnPages(msgspec.Struct, frozen=True, kw_only=True):
    """Where a customer's browser goes after paying, and after not paying."""

    success_url: str
    cancel_url: str

    def check(self) -> None:
        """Return if both are addresses. Errors: ReturnAddressInvalid."""
        check_url(self.success_url, "success_url")
        check_url(self.cancel_url, "cancel_url")


def check_url(url: str, param: str) -> None:
    """Return if *url* is an address that a browser should be sent to. Errors: ReturnAddressInvalid naming *param*."""
    try:
        parts = urlsplit(url)
        is_fine = parts.scheme in {"http", "https"} and bool(parts.hostname) and len(url) <= _LENGTH_MAX
    except ValueError:
        is_fine = False
    if not is_fine:
        raise ReturnAddressInvalid(param)
