"""Requests and replies, as the twin's logic sees them: no sockets here."""

from __future__ import annotations

from typing import Any, cast
from urllib.parse import unquote

import msgspec

from metering.billing.twin.errors import Object, StripeError
from metering.billing.twin.fields import decode_form


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP request. Header names are in lower case."""

    method: str
    path: str
    query: str = ""
    headers: dict[str, str] = {}
    body: bytes = b""

    @property
    def bearer(self) -> str:
        """The bearer token, or an empty string."""
        scheme, _, token = self.headers.get("authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""

    def params(self) -> Object:
        """The parameters: of the query for reads, of the body otherwise; a form, or JSON under /v2.

        Errors: 400 for a body that cannot be read.
        """
        if self.method != "POST":
            return decode_form(self.query)
        try:
            if not self.path.startswith("/v2/"):
                return decode_form(self.body.decode())
            sent: Any = msgspec.json.decode(self.body) if self.body else {}
        except (UnicodeDecodeError, msgspec.DecodeError):
            raise StripeError(400, "The request body could not be read.", code="parse_error") from None
        if not isinstance(sent, dict):
            raise StripeError(400, "The request body must be a JSON object.", code="parse_error")
        return cast("Object", sent)


class Reply(msgspec.Struct, frozen=True, kw_only=True):
    """An HTTP answer."""

    status: int
    headers: dict[str, str] = {}
    body: bytes = b""


def json_reply(status: int, value: Any, headers: dict[str, str] | None = None) -> Reply:
    """An answer in JSON."""
    body = msgspec.json.encode(value)
    return Reply(status=status, headers={"content-type": "application/json"} | (headers or {}), body=body)


def html_reply(text: str, status: int = 200) -> Reply:
    """A page. It loads nothing from elsewhere and may not be framed."""
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    }
    return Reply(status=status, headers=headers, body=text.encode())


def see_other(url: str) -> Reply:
    """Send the browser to *url*."""
    return Reply(status=303, headers={"location": url.replace("\r", "").replace("\n", "")})


def split_target(target: str) -> tuple[str, str]:
    """The path, decoded, and the query of a request's target."""
    path, _, query = target.partition("?")
    return unquote(path), query
