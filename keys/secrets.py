"""The secret part of an API key: its form, its checksum, its fingerprint. The only file that handles whole keys.

`sk-aap-` + 10 characters of public id + 43 characters of secret (256 bits) + 6 of CRC32, all base62 so that a double
click selects the key. The checksum covers everything before it: a typo is refused without I/O, and a scanner for leaked
secrets has no false positives (as GitHub's tokens, github.blog 2021-04-05).
"""

from __future__ import annotations

import hmac
import re
import secrets
import zlib
from typing import NamedTuple

from core.settings import Pepper

PREFIX = "sk-aap-"
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PUBLIC_LENGTH = 10
_SECRET_LENGTH = 43
_CHECKSUM_LENGTH = 6
_BODY_LENGTH = _PUBLIC_LENGTH + _SECRET_LENGTH
KEY_LENGTH = len(PREFIX) + _BODY_LENGTH + _CHECKSUM_LENGTH

# What a log scrubber or a secret scanner looks for. Published in docs/keys.md.
KEY_PATTERN = re.compile(f"{PREFIX}[0-9A-Za-z]{{{_BODY_LENGTH + _CHECKSUM_LENGTH}}}")


class Fingerprint(NamedTuple):
    """What the database keeps of a key: a keyed hash, and the pepper's name."""

    pepper_id: str
    digest: bytes


class Minted(NamedTuple):
    """A fresh key. *text* is shown once and kept nowhere."""

    text: str
    public_id: str
    hint: str

    def __repr__(self) -> str:
        """Keep the key out of logs and tracebacks."""
        return f"Minted({self.hint})"


def mint() -> Minted:
    """Return a fresh key from 256 random bits."""
    public_id = "".join(secrets.choice(_ALPHABET) for _ in range(_PUBLIC_LENGTH))
    body = public_id + _base62(secrets.randbits(256), _SECRET_LENGTH)
    text = PREFIX + body + _checksum(PREFIX + body)
    return Minted(text, public_id, hint(text))


def is_well_formed(text: str) -> bool:
    """Tell whether *text* has a key's form and checksum. No I/O: this is what turns away guesses."""
    if len(text) != KEY_LENGTH or not text.startswith(PREFIX) or not text.isascii():
        return False
    return _checksum(text[:-_CHECKSUM_LENGTH]) == text[-_CHECKSUM_LENGTH:]


def fingerprint(text: str, pepper: Pepper) -> Fingerprint:
    """Return the keyed hash of a whole key (decision 0004: no slow hash for 256 random bits)."""
    return Fingerprint(pepper.id, hmac.digest(pepper.key, text.encode(), "sha256"))


def hint(text: str) -> str:
    """Return what may be shown of a key afterwards: enough to recognise, not to use."""
    if len(text) == KEY_LENGTH and text.startswith(PREFIX):
        return f"{text[: len(PREFIX) + 4]}...{text[-4:]}"
    return "*" * 8


def redact(text: str) -> str:
    """Return *text* with every key in it replaced by its hint, and what looks like one: a typo away is too near."""
    # Piece by piece: a lookalike that runs into a real key must not swallow its beginning.
    first, *pieces = text.split(PREFIX)
    return first + "".join([_redact_piece(PREFIX + piece) for piece in pieces])


def _redact_piece(piece: str) -> str:
    found = KEY_PATTERN.match(piece)
    return hint(found[0]) + piece[found.end() :] if found else piece


def _checksum(text: str) -> str:
    return _base62(zlib.crc32(text.encode()), _CHECKSUM_LENGTH)


def _base62(number: int, length: int) -> str:
    digits: list[str] = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
