"""How the values of environment variables are read. Whatever is wrong: ValueError, saying what was expected.

Where a value may be a secret, the error does not repeat it.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from collections.abc import Callable
from typing import Final

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_RING_KEY: Final = re.compile(r"^[a-z0-9]{1,16}:[0-9a-f]{64}$")


def stripe_key(text: str) -> str | None:
    """Return a secret or restricted key of Stripe's."""
    if not re.fullmatch(r"[sr]k_(test|live)_\w+", text, re.ASCII):
        raise ValueError("expected a secret or restricted key, which begins with sk_ or rk_")
    return text


def webhook_secrets(text: str) -> tuple[str, ...]:
    """Return signing secrets of endpoints at Stripe."""
    secrets = tuple(part.strip() for part in text.split(",") if part.strip())
    # An empty secret would verify whatever anybody signs with nothing (GHSA-xff3-5c9p-2mr4).
    if not all(re.fullmatch(r"whsec_[\w+/=]{16,}", secret, re.ASCII) for secret in secrets):
        raise ValueError("expected whsec_ and at least 16 more characters, or several of these, separated by commas")
    return secrets


def rate(text: str) -> float:
    """Return a rate, in requests a second."""
    value = float(text)
    if not 0.1 <= value <= 10_000:
        raise ValueError(f"expected a rate from 0.1 to 10000 a second, got {text!r}")
    return value


def integer(low: int, high: int) -> Callable[[str], int]:
    """Return what reads a whole number from *low* to *high*."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or not low <= int(text) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """Return seconds, a day at most."""
    value = float(text)
    if not 0 <= value <= 86_400:
        raise ValueError(f"expected seconds from 0 to 86400, got {text!r}")
    return value


def lease(text: str) -> float:
    """Return the seconds after which who is not heard of is dead."""
    value = float(text)
    # It is renewed every two seconds: less would take every pause for a death.
    if not 5 <= value <= 300:
        raise ValueError(f"expected seconds from 5 to 300, got {text!r}")
    return value


def boolean(text: str) -> bool:
    """Return what a word for true or false means."""
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in words:
        raise ValueError(f"expected true or false, got {text!r}")
    return words[text.lower()]


def one_of(*words: str) -> Callable[[str], str]:
    """Return what reads one of *words*."""

    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError(f"expected one of {', '.join(words)}, got {text!r}")
        return text.lower()

    return parse


def url_of(*schemes: str) -> Callable[[str], str | None]:
    """Return what reads an address of one of *schemes*."""

    def parse(text: str) -> str | None:
        # The value may hold a password: say what was expected, never what was given.
        if text.partition("://")[0] not in schemes or "://" not in text:
            raise ValueError(f"expected an address that starts with {', '.join(s + '://' for s in schemes)}")
        return text

    return parse


def address(text: str) -> str:
    """Return an IP address; localhost is one."""
    return str(ipaddress.ip_address("127.0.0.1" if text == "localhost" else text))


def optional(text: str) -> str | None:
    """Return what is given."""
    return text


def networks(text: str) -> tuple[Network, ...]:
    """Return networks, comma-separated."""
    return tuple(ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if part.strip())


def ring(text: str) -> list[tuple[str, bytes]]:
    """Return keys with their ids: `id:64-hex-digits`, comma-separated, the newest first."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(_RING_KEY.match(part) for part in parts):
        raise ValueError("expected id:64-hex-digits, comma-separated, newest first")
    ring = [(part.partition(":")[0], bytes.fromhex(part.partition(":")[2])) for part in parts]
    if len({name for name, _ in ring}) != len(ring):
        raise ValueError("two keys have the same id")
    return ring


def signing_seed(text: str) -> bytes:
    """Return a key as Standard Webhooks writes it; some programs write the public half behind the private one."""
    try:
        key = base64.b64decode(text.removeprefix("whsk_"), validate=True)
    except binascii.Error:
        key = b""
    if not text.startswith("whsk_") or len(key) not in {32, 64}:
        raise ValueError("expected whsk_ and an ed25519 key in base64, or several of these, separated by commas")
    return key[:32]
