"""A mail server on a real socket: takes what it is told to, and remembers it."""

from __future__ import annotations

import asyncio
import base64
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default as default_policy
from typing import NamedTuple, cast


class Taken(NamedTuple):
    """A mail with its envelope."""

    sender: str
    recipients: list[str]
    source: bytes
    is_encrypted: bool

    @property
    def message(self) -> EmailMessage:
        return cast("EmailMessage", message_from_bytes(self.source, policy=default_policy))

    @property
    def text(self) -> str:
        return self.message.get_content().replace("\r\n", "\n")


class MailServer:
    """Answers as `refusals` says, one line for each command that is named there; everything else is taken."""

    def __init__(self, tls_context: ssl.SSLContext | None = None) -> None:
        self.taken: list[Taken] = []
        self.logins: list[str] = []
        self.connections = 0
        self.refusals: dict[str, list[str]] = {}
        """Command (RCPT, DATA, MAIL, AUTH) → what is answered to the next of them, each once."""
        self.breaks_after_data = 0
        """So many times the connection is closed where "taken" should be said."""
        self._tls_context = tls_context
        self._running: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._running.add(writer)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            self._running.discard(writer)
            writer.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sender, recipients, is_encrypted = "", [], False
        writer.write(b"220 here\r\n")
        while line := (await reader.readline()).decode().strip():
            command = line.split(" ", maxsplit=1)[0].upper()
            if refusal := self._refusal(command):
                answer = refusal
            elif command == "EHLO":
                can_encrypt = self._tls_context is not None and not is_encrypted
                answer = "250-here\r\n" + ("250-STARTTLS\r\n" if can_encrypt else "") + "250 AUTH PLAIN"
            elif command == "STARTTLS" and self._tls_context is not None:
                writer.write(b"220 go\r\n")
                plain = writer.transport
                try:
                    await writer.start_tls(self._tls_context)
                except AttributeError:
                    # The client did not like the certificate; Python 3.11 then forgets what is to be closed.
                    writer._transport = plain
                    return
                is_encrypted = True
                continue
            elif command == "AUTH":
                self.logins.append(base64.b64decode(line.rsplit(" ", maxsplit=1)[1]).decode())
                answer = "235 welcome"
            elif command == "MAIL":
                sender, recipients, answer = line[10:].split(" ")[0].strip("<>"), [], "250 fine"
            elif command == "RCPT":
                recipients.append(line[8:].split(" ")[0].strip("<>"))
                answer = "250 fine"
            elif command == "DATA":
                writer.write(b"354 go on\r\n")
                source = (await reader.readuntil(b"\r\n.\r\n")).removesuffix(b".\r\n").replace(b"\r\n..", b"\r\n.")
                self.taken.append(Taken(sender, recipients, source, is_encrypted))
                if self.breaks_after_data:
                    self.breaks_after_data -= 1
                    return
                answer = "250 taken"
            else:
                answer = "221 bye" if command == "QUIT" else "250 fine"
            writer.write(f"{answer}\r\n".encode())
            await writer.drain()
            if command == "QUIT":
                return

    def _refusal(self, command: str) -> str | None:
        queued = self.refusals.get(command)
        return queued.pop(0) if queued else None

    def hang_up(self) -> None:
        for writer in self._running:
            writer.transport.abort()


@asynccontextmanager
async def mail_server(
    tls_context: ssl.SSLContext | None = None, *, is_wrapped: bool = False
) -> AsyncGenerator[MailServer]:
    """With *is_wrapped* a connection begins with TLS; else STARTTLS is offered where there is a context."""
    made = MailServer(None if is_wrapped else tls_context)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=tls_context if is_wrapped else None)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        made.hang_up()
        await server.wait_closed()
