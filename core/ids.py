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
_RANDOM_CHARACTERS = 16
# One random byte, one character. Version 7 stands in the upper bits of the first of the sixteen, the variant in the
# middle bits of the fourth (RFC 9562, section 5.7).
_ANY = "".join(_ALPHABET[byte & 31] for byte in range(256)).encode()
_FIRST = "".join(_ALPHABET[0b01110 | byte & 1] for byte in range(256)).encode()
_FOURTH = "".join(_ALPHABET[0b01000 | byte & 0b10011] for byte in range(256)).encode()


class _Source:
    """Random text and that of the present millisecond, both bought in batches. Dropped in a forked child."""

    __slots__ = ("_milliseconds", "_position", "_stamp", "_text")

    def __init__(self) -> None:
        self._drop()
        os.register_at_fork(after_in_child=self._drop)

    def _drop(self) -> None:
        self._text = ""
        self._position = 0
        self._milliseconds = 0
        self._stamp = ""

    def take(self) -> str:
        """Return the last sixteen characters: version, variant and 74 random bits."""
        start = self._position
        if start == len(self._text):
            # One system call for several hundred ids.
            random = bytearray(os.urandom(_ENTROPY_BATCH_BYTES))
            text = random.translate(_ANY)
            text[0::_RANDOM_CHARACTERS] = random[0::_RANDOM_CHARACTERS].translate(_FIRST)
            text[3::_RANDOM_CHARACTERS] = random[3::_RANDOM_CHARACTERS].translate(_FOURTH)
            self._text = text.decode()
            start = 0
        self._position = end = start + _RANDOM_CHARACTERS
        return self._text[start:end]

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
    return f"{prefix}_{_source.stamp()}{_source.take()}"


def id_range_start(prefix: str, moment: datetime) -> str:
    """Return a text below every id with *prefix* that is made from *moment* on, and above all earlier ones."""
    return f"{prefix}_{_stamp((moment - _EPOCH) // timedelta(milliseconds=1))}"


def moment_of(identifier: str) -> datetime:
    """Return when an id was made, to the millisecond. Errors: ValueError for what is no id."""
    milliseconds = 0
    for character in identifier.partition("_")[2][:10]:
        milliseconds = milliseconds << 5 | _ALPHABET.index(character)
    return _EPOCH + timedelta(milliseconds=milliseconds)
