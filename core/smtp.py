"""Mail by SMTP (RFC 5321, 3207), through aiosmtplib. Imported only where a server is configured."""

from __future__ import annotations

import asyncio
import ssl
from email.utils import parseaddr
from typing import Final

import aiosmtplib

from core.mail import Mail, MailFailed, build, domain_of
from core.settings import MailSettings

_ANSWER_SECONDS_MAX: Final = 20.0
"""Of each command. Servers that think about spam may take that long."""
SEND_SECONDS_MAX: Final = 60.0


class SmtpMailer:
    """Hands mails to one server, each over a connection of its own: there are few, and none is worth keeping open.

    With `starttls` a server that does not offer it gets neither a mail nor the password.
    """

    def __init__(self, settings: MailSettings, *, tls_context: ssl.SSLContext | None = None) -> None:
        """Connect to nothing yet. *tls_context* says which certificates are good; by default those of the system."""
        self._settings = settings
        self._tls_context = tls_context

    async def send(self, mail: Mail) -> None:
        """Hand *mail* to the server. When this returns, the server has taken it.

        A connection that breaks behind the last byte leaves that open: then it is sent again, with the same
        `Message-ID`. Errors: MailFailed.
        """
        message = build(mail, self._settings.sender)
        try:
            async with asyncio.timeout(SEND_SECONDS_MAX), self._client() as client:
                await client.send_message(
                    message, sender=parseaddr(self._settings.sender)[1], recipients=[mail.recipient]
                )
        except aiosmtplib.SMTPRecipientsRefused as error:
            refused = error.recipients[0]
            raise MailFailed(f"refused: {refused.code} {refused.message}", is_final=refused.code >= 500) from error
        except aiosmtplib.SMTPDataError as error:
            raise MailFailed(f"refused: {error.code} {error.message}", is_final=error.code >= 500) from error
        except (aiosmtplib.SMTPException, OSError, TimeoutError) as error:
            raise MailFailed(f"{type(error).__name__}: {error}", is_servers=True) from error

    def _client(self) -> aiosmtplib.SMTP:
        settings = self._settings
        return aiosmtplib.SMTP(
            hostname=settings.host,
            port=settings.port,
            username=settings.user,
            password=settings.password,
            # Not this machine's name: finding that out may take a name server, and it is nobody's business.
            local_hostname=domain_of(settings.sender),
            timeout=_ANSWER_SECONDS_MAX,
            use_tls=settings.encryption == "tls",
            start_tls=settings.encryption == "starttls",
            tls_context=self._tls_context if settings.encryption != "none" else None,
        )
