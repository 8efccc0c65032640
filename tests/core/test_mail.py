"""Mail: one message from what it says, and a real server to take it."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime
from email import message_from_bytes
from email.policy import default as default_policy
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from core.mail import LogMailer, Mail, MailFailed, build, mailer_for
from core.settings import MailSettings
from core.smtp import SmtpMailer
from tests.harness.authority import Authority
from tests.harness.smtp import mail_server

MAIL = Mail(
    id="mail_1",
    recipient="ada@example.com",
    subject="Hello",
    text="First line\n.\nÄ last one\n",
    written_at=datetime(2027, 1, 15, 12, tzinfo=UTC),
)


def settings(port: int, encryption: str = "none", **changed: str) -> MailSettings:
    given_settings = MailSettings(
        host="localhost", port=port, user=None, password=None, sender="Acme <billing@acme.test>", encryption="none"
    )
    return msgspec.structs.replace(given_settings, encryption=encryption, **changed)


class TestMessage:
    def test_it_is_the_same_however_often_it_is_made(self) -> None:
        """Guarantee: what is sent twice can be told to be one, by its Message-ID and by everything else."""
        first, again = build(MAIL, "billing@acme.test"), build(MAIL, "billing@acme.test")
        assert first.as_bytes() == again.as_bytes()
        assert first["Message-ID"] == "<mail_1@acme.test>"
        assert first["Date"] == "Fri, 15 Jan 2027 12:00:00 +0000"

    @given(
        subject=st.text(max_size=300) | st.sampled_from(["a\r\nBcc: eve@example.com", "a\n\n<p>", "a\u2028Bcc: e@x"])
    )
    def test_a_subject_is_one_header_whatever_it_holds(self, subject: str) -> None:
        """Guarantee: text of others, such as an organization's name, makes no header and no body."""
        mail = msgspec.structs.replace(MAIL, subject=subject.encode("utf-8", "ignore").decode())
        read = message_from_bytes(build(mail, "b@acme.test").as_bytes(), policy=default_policy)
        assert set(read.keys()) == set(build(MAIL, "b@acme.test").keys())
        assert read["To"] == MAIL.recipient
        assert read.get_content().replace("\r\n", "\n") == MAIL.text

    @pytest.mark.parametrize(
        "recipient",
        ["", "ada", "a@b, c@d", "a@b\r\nBcc: c@d", "Ada <a@b>", "a b@c", "a@b;c@d", "ä@b", "a@b.", f"{'a' * 250}@b.cc"],
    )
    def test_what_is_not_one_address_gets_nothing(self, recipient: str) -> None:
        with pytest.raises(MailFailed) as raised:
            build(msgspec.structs.replace(MAIL, recipient=recipient), "b@acme.test")
        assert raised.value.is_final


class TestServer:
    async def test_a_mail_arrives(self) -> None:
        async with mail_server() as server:
            await SmtpMailer(settings(server.port)).send(MAIL)
        (taken,) = server.taken
        assert (taken.sender, taken.recipients) == ("billing@acme.test", ["ada@example.com"])
        assert taken.text == MAIL.text
        assert (taken.message["From"], taken.message["Auto-Submitted"]) == (
            "Acme <billing@acme.test>",
            "auto-generated",
        )

    @pytest.mark.parametrize("encryption", ["starttls", "tls"])
    async def test_encrypted_and_with_a_password(self, tmp_path: Path, encryption: str) -> None:
        authority = Authority(tmp_path)
        async with mail_server(authority.server_context("localhost"), is_wrapped=encryption == "tls") as server:
            used = settings(server.port, encryption, user="u", password="p")
            await SmtpMailer(used, tls_context=authority.client_context()).send(MAIL)
        assert [taken.is_encrypted for taken in server.taken] == [encryption == "starttls"]
        assert server.logins == ["\0u\0p"]

    async def test_a_certificate_of_nobodys_gets_nothing(self, tmp_path: Path) -> None:
        async with mail_server(Authority(tmp_path).server_context("localhost")) as server:
            with pytest.raises(MailFailed) as raised:
                await SmtpMailer(settings(server.port, "starttls", user="u", password="p")).send(MAIL)
        assert (raised.value.is_servers, server.taken, server.logins) == (True, [], [])

    async def test_a_server_that_cannot_encrypt_gets_nothing(self) -> None:
        """Guarantee: whoever takes STARTTLS out of the conversation learns neither the mail nor the password."""
        async with mail_server() as server:
            with pytest.raises(MailFailed) as raised:
                await SmtpMailer(settings(server.port, "starttls", user="u", password="p")).send(MAIL)
        assert (raised.value.is_servers, server.taken, server.logins) == (True, [], [])

    @pytest.mark.parametrize(
        ("command", "answer", "is_final", "is_servers"),
        [
            ("RCPT", "451 later", False, False),
            ("RCPT", "550 nobody of that name", True, False),
            ("DATA", "554 no", True, False),
            ("MAIL", "421 too busy", False, True),
        ],
    )
    async def test_a_refusal_says_whether_trying_again_helps(
        self, command: str, answer: str, is_final: bool, is_servers: bool
    ) -> None:
        async with mail_server() as server:
            server.refusals[command] = [answer]
            with pytest.raises(MailFailed) as raised:
                await SmtpMailer(settings(server.port)).send(MAIL)
        assert (raised.value.is_final, raised.value.is_servers, server.taken) == (is_final, is_servers, [])

    async def test_a_server_that_is_not_there(self, unused_tcp_port: int) -> None:
        with pytest.raises(MailFailed) as raised:
            await SmtpMailer(settings(unused_tcp_port)).send(MAIL)
        assert (raised.value.is_final, raised.value.is_servers) == (False, True)


class TestLog:
    async def test_without_a_server_it_is_written_to_the_log(self) -> None:
        with capture_logs() as logs:
            mailer = mailer_for(msgspec.structs.replace(settings(1), host=None, sender=""))
            await mailer.send(msgspec.structs.replace(MAIL, text="Pay: https://invoice.stripe.com/i/secret now"))
        assert isinstance(mailer, LogMailer)
        assert logs == [
            {
                "event": "mail.written",
                "log_level": "info",
                "mail_id": "mail_1",
                "to": "ada@example.com",
                "subject": "Hello",
                "text": "Pay: (link) now",
            }
        ]

    def test_nothing_of_smtp_is_loaded_for_it(self) -> None:
        code = "import sys, gateway.back_office as w; print([n for n in ('aiosmtplib', 'stripe') if n in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]"
