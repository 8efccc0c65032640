"""From a request's headers to the credential in them. Every form that clients send goes through this one function."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from keys.errors import KeyIncorrect

_BEARER: Final = b"bearer "
# `x-api-key` is what Anthropic's clients send, `api-key` Azure's.
_HEADERS: Final = frozenset({b"authorization", b"x-api-key", b"api-key"})


def credential_in(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """Return the one credential that was sent, None if there is none.

    Errors: KeyIncorrect when there are several that differ: which one counts must not depend on who reads.
    """
    found: bytes | None = None
    for name, value in headers:
        if name not in _HEADERS:
            continue
        credential = value.strip()
        if name == b"authorization":
            if credential[:7].lower() != _BEARER:
                raise KeyIncorrect("*" * 8, "Expected an Authorization header of the form 'Bearer YOUR_KEY'.")
            credential = credential[7:].strip()
        if found is not None and credential != found:
            raise KeyIncorrect("*" * 8, "Several different credentials were sent.")
        found = credential
    return found
