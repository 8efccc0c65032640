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
RequestId = NewType("RequestId", str)
GatewayId = NewType("GatewayId", str)

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_PAIRS = [a + b for a in _ALPHABET for b in _ALPHABET]
_ENTROPY_BATCH_BYTES = 4096


class _Entropy:
    """Random bytes bought in batches: one system call for several hundred ids. Dropped in a forked child."""

    __slots__ = ("_bytes", "_position")

    def __init__(self) -> None:
        self._bytes = b""
        self._position = 0
        os.register_at_fork(after_in_child=self._drop)

    def _drop(self) -> None:
        self._bytes = b""
        self._position = 0

    def take_80_bits(self) -> int:
        if self._position + 10 > len(self._bytes):
            self._bytes = os.urandom(_ENTROPY_BATCH_BYTES)
            self._position = 0
        start = self._position
        self._position = start + 10
        return int.from_bytes(self._bytes[start : start + 10], "big")


_entropy = _Entropy()


def new_id(prefix: str) -> str:
    """Return a fresh id such as `key_01jd…`: 48 bits of milliseconds, 74 random bits."""
    random_bits = _entropy.take_80_bits()
    value = (time.time_ns() // 1_000_000) << 80 | random_bits
    # Version 7 and variant 2 sit at fixed places (RFC 9562, section 5.7).
    value = value & ~(0xF << 76) | (0x7 << 76)
    value = value & ~(0x3 << 62) | (0x2 << 62)
    pairs = _PAIRS
    return (
        f"{prefix}_{pairs[value >> 120]}{pairs[value >> 110 & 1023]}{pairs[value >> 100 & 1023]}"
        f"{pairs[value >> 90 & 1023]}{pairs[value >> 80 & 1023]}{pairs[value >> 70 & 1023]}"
        f"{pairs[value >> 60 & 1023]}{pairs[value >> 50 & 1023]}{pairs[value >> 40 & 1023]}"
        f"{pairs[value >> 30 & 1023]}{pairs[value >> 20 & 1023]}{pairs[value >> 10 & 1023]}{pairs[value & 1023]}"
    )
