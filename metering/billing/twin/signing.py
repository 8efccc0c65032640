"""Stripe's webhook signature: HMAC-SHA256 over `timestamp.body`, in the header `Stripe-Signature`."""

from __future__ import annotations

import hashlib
import hmac


def signature_header(secret: str, body: bytes, at: int) -> str:
    """`t=…,v1=…` for *body*, signed at *at* (Unix seconds)."""
    signed = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={signed}"
