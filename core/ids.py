"""Prefixed, time-sortable identifiers: the same text in the database, logs, API and webhooks.

`key_` + 26 characters of lower-case base32 (Crockford's alphabet, which sorts like the bits) of a UUIDv7 (RFC 9562).
"""

from __future__ import annotations

import os
import time
from typing import NewType

OrganizationId = NewType("OrganizationId", str)
ProjectId = NewType("ProjectId", str)
KeyId = NewType("KeyId", str)
SecretId = NewType("SecretId", str)
GatewayId = NewType("GatewayId", str)

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
            pairs = _PAIRS
            self._stamp = (
                f"{pairs[now >> 40]}{pairs[now >> 30 & 1023]}{pairs[now >> 20 & 1023]}"
                f"{pairs[now >> 10 & 1023]}{pairs[now & 1023]}"
            )
        return self._stamp


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
