"""Prefixed, time-sortable identifiers: the same text in the database, logs, API and webhooks.

`key_` + 26 characters of lower-case base32 (Crockford's alphabet, which sorts like the bits) of a UUIDv7 (RFC 9562).
"""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from typing import NewType

OrganizationId = NewType("OrganizationId", str)
ProjectId = NewType("ProjectId", str)
KeyId = NewType("KeyId", str)
SecretId = NewType("SecretId", str)
GatewayId = NewType("GatewayId", str)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]
_ENTROPY_BATCH_BYTES = 4096
_RANDOM_MASK = ~(0xF << 76 | 0x3 << 62)
_VERSION_AND_VARIANT = 0x7 << 76 | 0x2 << 62


class _Source:
    """Random bits and the text of the present millisecond, both bought in batches. Dropped in a forked child."""

    __slots__ = ("_bytes", "_milliseconds", "_position", "_stamp")

    def __init__(self) -> None:
        self._drop()
        os.register_at_fork(after_in_child=self._drop)

    def _drop(self) -> None:
        self._bytes = b""
        self._position = 0
        self._milliseconds = 0
        self._stamp = ""

    def take_80_bits(self) -> int:
        start = self._position
        if start + 10 > len(self._bytes):
            # One system call for several hundred ids.
            self._bytes = os.urandom(_ENTROPY_BATCH_BYTES)
            start = 0
        self._position = start + 10
        return int.from_bytes(self._bytes[start : start + 10], "big")

    def stamp(self) -> str:
        """Return the first ten characters: the 48 bits of time, and nothing else."""
        now = time.time_ns() // 1_000_000
        if now != self._milliseconds:
            self._milliseconds = now
            self._stamp = _stamp(now)
        return self._stamp


def _stamp(milliseconds: int) -> str:
    pairs = _PAIRS
    return (
        f"{pairs[milliseconds >> 40]}{pairs[milliseconds >> 30 & 1023]}{pairs[milliseconds >> 20 & 1023]}"
        f"{pairs[milliseconds >> 10 & 1023]}{pairs[milliseconds & 1023]}"
    )


_source = _Source()


def new_id(prefix: str) -> str:
    """Return a fresh id such as `key_01jd…`: 48 bits of milliseconds, 74 random bits."""
    # Version 7 and variant 2 sit at fixed places (RFC 9562, section 5.7).
    bits = _source.take_80_bits() & _RANDOM_MASK | _VERSION_AND_VARIANT
    pairs = _PAIRS
    return (
        f"{prefix}_{_source.stamp()}{pairs[bits >> 70]}{pairs[bits >> 60 & 1023]}{pairs[bits >> 50 & 1023]}"
        f"{pairs[bits >> 40 & 1023]}{pairs[bits >> 30 & 1023]}{pairs[bits >> 20 & 1023]}"
        f"{pairs[bits >> 10 & 1023]}{pairs[bits & 1023]}"
    )


def id_range_start(prefix: str, moment: datetime) -> str:
    """Return a text below every id with *prefix* that is made from *moment* on, and above all earlier ones."""
    return f"{prefix}_{_stamp((moment - _EPOCH) // timedelta(milliseconds=1))}"


def moment_of(identifier: str) -> datetime:
    """Return when an id was made, to the millisecond. Errors: ValueError for what is no id."""
    milliseconds = 0
    for character in identifier.partition("_")[2][:10]:
        milliseconds = milliseconds << 5 | _ALPHABET.index(character)
    return _EPOCH + timedelta(milliseconds=milliseconds)
