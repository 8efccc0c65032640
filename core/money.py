"""Money: whole nano-USD (10^-9 US dollars). No float ever holds an amount, and nothing is rounded but at rating."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final, NewType

NanoUsd = NewType("NanoUsd", int)

NANO_USD_PER_USD: Final = 1_000_000_000
NANO_USD_PER_CENT: Final = 10_000_000
_AMOUNT: Final = re.compile(r"-?\d{1,12}(?:\.\d{1,9})?", re.ASCII)
# A second or a picture costs so little that nine decimals are too few: a rate holds fifteen.
_EACH: Final = re.compile(r"\d{1,6}(?:\.\d{1,15})?", re.ASCII)
_RATE_PER_USD_EACH: Final = 10**15


def usd_text(amount: int) -> str:
    """Return *amount* of nano-USD in US dollars, exactly: `0.0000025`, `12`, `-0.5`."""
    whole, rest = divmod(abs(amount), NANO_USD_PER_USD)
    text = f"{whole}.{rest:09d}".rstrip("0") if rest else str(whole)
    return f"-{text}" if amount < 0 else text


def parse_usd(text: str) -> NanoUsd:
    """Return US dollars as written, in nano-USD. Errors: ValueError for what is no amount, or finer than a nano-USD."""
    if not _AMOUNT.fullmatch(text):
        raise ValueError("expected US dollars with at most nine decimals, such as 12.50")
    return NanoUsd(int(Decimal(text) * NANO_USD_PER_USD))


def parse_usd_each(text: str) -> int:
    """Return US dollars for one thing in nano-USD per million of them. Errors: ValueError for what is no such price."""
    if not _EACH.fullmatch(text):
        raise ValueError("expected US dollars with at most fifteen decimals, such as 0.0001")
    return int(Decimal(text) * _RATE_PER_USD_EACH)
