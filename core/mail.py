"""Plain-text mail: what one is, and who takes it. The mail server's own file is `core/smtp.py`.

What may go wrong is one error, `MailFailed`, which says whether trying again can help.
"""

from __future__ import annotations

import re
from datetime import datetime
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, parseaddr
from importlib import import_module
from typing import Final, Protocol

import msgspec
import structlog

from core.settings import MailSettings

_ADDRESS: Final = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*", re.ASCII)
_ADDRESS_MAX: Final = 254
_SUBJECT_MAX: Final = 200
_LINK: Final = re.compile(r"https?://\S+")
_NOBODY: Final = "mail.invalid"
"""Where nothing is sent there may be no sender; RFC 2606 keeps the name from being anybody's."""
_log = structlog.get_logger(__name__)


class MailFailed(Exception):
    """A mail was not taken. Its text is for operators.

    *is_final*: no later try can help. *is_servers*: others would fail in the same way now.
    """

    def __init__(self, problem: str, *, is_final: bool = False, is_servers: bool = False) -> None:
        super().__init__(problem)
        self.is_final = is_final
        self.is_servers = is_servers


class Mail(msgspec.Struct, frozen=True, kw_only=True):
    """A mail to one person. The same *id* and time make the same mail, `Message-ID` included, however often it goes."""

    id: str
    recipient: str
    subject: str
    text: str
    written_at: datetime


class Mailer(Protocol):
    """Takes mails."""

    async def send(self, mail: Mail) -> None:
        """Return once somebody else is answerable for *mail*. Errors: MailFailed."""
        ...


class LogMailer:
    """Writes to the log what would be sent. Links are left out: some of them open an invoice for whoever has them."""

    async def send(self, mail: Mail) -> None:
        """Write *mail* to the log. Errors: MailFailed where no server could send it either."""
        built = build(mail, "")
        _log.info(
            "mail.written",
            mail_id=mail.id,
            to=mail.recipient,
            subject=str(built["Subject"]),
            text=_LINK.sub("(link)", mail.text),
        )


def mailer_for(settings: MailSettings) -> Mailer:
    """Return what takes mails: a server where one is configured, else the log."""
    if settings.host is None:
        return LogMailer()
    # Imported where mail is sent, and nowhere else.
    mailer: Mailer = import_module("core.smtp").SmtpMailer(settings)
    return mailer


def build(mail: Mail, sender: str) -> EmailMessage:
    """Return *mail* as a message of *sender*, such as `Acme <billing@example.com>`.

    Whatever stands in the subject, it is one line and no other header. Errors: MailFailed for a recipient that is not
    exactly one address in ASCII.
    """
    if len(mail.recipient) > _ADDRESS_MAX or not _ADDRESS.fullmatch(mail.recipient):
        raise MailFailed("the address is none that mail can be sent to", is_final=True)
    message = EmailMessage(policy=SMTP)
    message["From"] = sender or f"nobody@{_NOBODY}"
    message["To"] = mail.recipient
    message["Subject"] = one_line(mail.subject)[:_SUBJECT_MAX]
    message["Date"] = format_datetime(mail.written_at)
    message["Message-ID"] = f"<{mail.id}@{domain_of(sender)}>"
    # RFC 3834: no out-of-office answers to these.
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(mail.text)
    return message


def domain_of(sender: str) -> str:
    """Return the part of a sender's address behind the @."""
    return parseaddr(sender)[1].rpartition("@")[2] or _NOBODY


def one_line(text: str) -> str:
    """Return *text* with each run of spaces, line ends and control characters as one space."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())
