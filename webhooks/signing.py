"""Signatures of Standard Webhooks 1.0: `v1` under the endpoint's own secret, `v1a` under the platform's key.

What is signed is `{id}.{timestamp}.{body}`. A receiver needs one signature that it can verify; during a rotation the
header holds one for every secret that has not ended.
"""

from __future__ import annotations

import binascii
import hashlib
import hmac
import secrets
from base64 import b64decode, b64encode, urlsafe_b64encode
from collections.abc import Sequence
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from core.settings import SigningSeed

SECRET_PREFIX: Final = "whsec_"  # noqa: S105 - how every secret begins
_SECRET_BYTES: Final = 32
# Standard Webhooks: between 24 and 64 bytes.
_SECRET_BYTES_RANGE: Final = range(24, 65)


class PlatformKeys:
    """The keys by which every webhook of this installation is signed, and which anybody may know the other half of."""

    def __init__(self, seeds: Sequence[SigningSeed]) -> None:
        self._keys = [Ed25519PrivateKey.from_private_bytes(seed.seed) for seed in seeds]

    def signatures(self, signed: bytes) -> list[str]:
        """Return a `v1a` signature for each key."""
        return [f"v1a,{b64encode(key.sign(signed)).decode()}" for key in self._keys]

    def published(self) -> list[dict[str, Any]]:
        """Return the public keys as RFC 8037 has them, each also as Standard Webhooks writes it."""
        found: list[dict[str, Any]] = []
        for key in self._keys:
            public = key.public_key().public_bytes_raw()
            found.append(
                {
                    "kty": "OKP",
                    "crv": "Ed25519",
                    "use": "sig",
                    "alg": "EdDSA",
                    "kid": hashlib.sha256(public).hexdigest()[:16],
                    "x": urlsafe_b64encode(public).rstrip(b"=").decode(),
                    "webhook_key": f"whpk_{b64encode(public).decode()}",
                }
            )
        return found


def new_secret() -> bytes:
    """Return a fresh signing secret: 256 random bits."""
    return secrets.token_bytes(_SECRET_BYTES)


def secret_text(secret: bytes) -> str:
    """Return *secret* as receivers' libraries take it."""
    return SECRET_PREFIX + b64encode(secret).decode()


def parse_secret(text: str) -> bytes:
    """Return the secret that `whsec_…` stands for. Errors: ValueError, which does not repeat it."""
    try:
        secret = b64decode(text.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    # Python takes surplus padding for none.
    if secret_text(secret) != text or len(secret) not in _SECRET_BYTES_RANGE:
        raise ValueError("expected whsec_ and 24 to 64 bytes in base64")
    return secret


def sign(event_id: str, timestamp: int, body: bytes, secrets_of_endpoint: Sequence[bytes], keys: PlatformKeys) -> str:
    """Return the value of `webhook-signature`."""
    signed = f"{event_id}.{timestamp}.".encode() + body
    own = [f"v1,{b64encode(hmac.digest(secret, signed, 'sha256')).decode()}" for secret in secrets_of_endpoint]
    return " ".join([*own, *keys.signatures(signed)])
