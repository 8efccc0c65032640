"""Forms as a provider reads them: with another parser than ours."""

from __future__ import annotations

from email.message import Message
from email.parser import BytesParser
from typing import NamedTuple, cast

from tests.harness.provider import Received


class SentPart(NamedTuple):
    name: str
    filename: str | None
    value: bytes


def read_form(content_type: str, body: bytes) -> list[SentPart]:
    message = BytesParser().parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    parts = cast("list[Message]", message.get_payload())
    found: list[SentPart] = []
    for part in parts:
        name = part.get_param("name", header="content-disposition")
        filename = part.get_param("filename", header="content-disposition")
        value = cast("bytes", part.get_payload(decode=True))
        found.append(SentPart(str(name), None if filename is None else str(filename), value))
    return found


def sent_form(received: Received) -> list[SentPart]:
    return read_form(received.header("content-type") or "", received.body)
