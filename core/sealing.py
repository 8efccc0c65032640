"""Secrets at rest: sealed under a key of the operator's, bound to the place where they are kept.

AES-256-GCM. What is sealed for one row cannot be opened in another: the place is authenticated with it. The first key
of the ring seals; all of them open. A key that is gone: SealBroken, which names it.
"""

from __future__ import annotations

import os
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from core.settings import SealingKey

_VERSION: Final = b"\x01"
_NONCE_BYTES: Final = 12


class SealBroken(Exception):
    """What is sealed cannot be opened: its key is not there, or it was changed or moved."""


class Sealer:
    """Seals and opens. *keys* are the ring, the newest first; at least one."""

    def __init__(self, keys: tuple[SealingKey, ...]) -> None:
        self._newest = keys[0].id
        self._ciphers = {key.id: AESGCM(key.key) for key in keys}

    def seal(self, secret: bytes, place: str) -> bytes:
        """Return *secret* sealed for *place*, such as `org_…|webhook_secrets|whs_…`."""
        nonce = os.urandom(_NONCE_BYTES)
        key_id = self._newest.encode()
        head = _VERSION + bytes([len(key_id)]) + key_id
        return head + nonce + self._ciphers[self._newest].encrypt(nonce, secret, head + place.encode())

    def open(self, sealed: bytes, place: str) -> bytes:
        """Return what was sealed for *place*. Errors: SealBroken."""
        end = 2 + sealed[1] if len(sealed) > 1 else 0
        if sealed[:1] != _VERSION or len(sealed) < end + _NONCE_BYTES:
            raise SealBroken("it is not in a form that is known here")
        head, rest = sealed[:end], sealed[end:]
        key_id = head[2:].decode(errors="replace")
        cipher = self._ciphers.get(key_id)
        if cipher is None:
            raise SealBroken(f"the sealing key {key_id!r} is not among AAP_SEALING_KEYS")
        try:
            return cipher.decrypt(rest[:_NONCE_BYTES], rest[_NONCE_BYTES:], head + place.encode())
        except InvalidTag:
            raise SealBroken("it was changed, moved, or sealed under another key of the same id") from None

    def is_newest(self, sealed: bytes) -> bool:
        """Tell whether *sealed* is under the key that seals now."""
        return sealed[2 : 2 + sealed[1]] == self._newest.encode()
