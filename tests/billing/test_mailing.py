"""Mails from rows to a real server: sent, tried again, given up, and each once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from core.clock import SystemClock
from core.database import Database
from core.ids import OrganizationId
from core.mail import LogMailer, Mail
from core.settings import MailSettings, Pepper
from core.smtp import SmtpMailer
from gateway.back_office import BackOffice
from metering.billing import emails
from metering.billing.mail_texts import FactsUnreadable, text_of
from metering.billing.mailing import ATTEMPTS_MAX, send_due
from metering.billing.stripe_objects import Invoice
from tests.harness.billing import empty
from tests.harness.eventually import eventually
from tests.harness.smtp import MailServer, mail_server
from tests.harness.stores import TestStores
from tests.harness.tenant import new_tenant

INVOICE = {"invoice": "AB-1", "due_cents": 123456, "currency": "usd", "page_url": "https://invoice.stripe.com/i/1"}
NOW = datetime.now(UTC)


@dataclass
class Office:
    database: Database
    pepper: Pepper
    server: MailServer
    mailer: SmtpMailer
    organizations: list[OrganizationId] = field(default_factory=list[OrganizationId])

    async def organization(self, name: str = "Acme", email: str | None = "ada@acme.test") -> OrganizationId:
        organization_id = (await new_tenant(self.database, self.pepper)).organization_id
        await self.run("UPDATE organizations SET name = :name WHERE id = :org", name=name, org=organization_id)
        await self.run(
            "INSERT INTO billing_customers (organization_id, email) VALUES (:org, :email)",
            org=organization_id,
            email=email,
        )
        return organization_id

    async def note(self, organization_id: OrganizationId, reason: str = "in_1", **facts: Any) -> bool:
        async with self.database.transaction() as session:
            return await emails.note(
                session, "payment_failed", reason, {**INVOICE, **facts}, organization_id=organization_id
            )

    async def run(self, query: str, **values: object) -> None:
        async with self.database.transaction() as session:
            await session.execute(text(query), values)

    async def rows(self, query: str = "SELECT state, attempts FROM emails ORDER BY id") -> list[tuple[Any, ...]]:
        async with self.database.transaction() as session:
            return [tuple(row) for row in await session.execute(text(query))]

    async def send(self) -> int:
        return await send_due(self.database, self.mailer)

    async def wait(self) -> None:
        """Let the time pass until the next try."""
        await self.run("UPDATE emails SET due_at = now() WHERE state = 'new'")

    @property
    def worker(self) -> BackOffice:
        return BackOffice(self.database, self.mailer, SystemClock())


def mailer_to(port: int) -> SmtpMailer:
    return SmtpMailer(
        MailSettings(host="localhost", port=port, user=None, password=None, sender="b@aap.test", encryption="none")
    )


@pytest.fixture
async def office(books: Database, stores: TestStores) -> AsyncGenerator[Office]:
    async with AsyncExitStack() as stack:
        await empty(books)
        server = await stack.enter_async_context(mail_server())
        yield Office(books, stores.pepper, server, mailer_to(server.port))
    await empty(books)
    async with books.transaction() as session:
        await session.execute(text("TRUNCATE allowance_events, budget_events, budgets CASCADE"))


class TestSending:
    async def test_a_mail_is_sent_once_for_one_reason(self, office: Office) -> None:
        organization_id = await office.organization()
        assert [await office.note(organization_id) for _ in range(2)] == [True, False]
        assert [await office.send() for _ in range(2)] == [1, 0]
        assert await office.note(organization_id) is False
        assert await office.send() == 0
        (taken,) = office.server.taken
        assert taken.recipients == ["ada@acme.test"]
        assert taken.message["Subject"] == "Payment failed: invoice AB-1 of Acme"
        assert "1,234.56 USD" in taken.text
        assert "https://invoice.stripe.com/i/1\n" in taken.text
        ((mail_id, state, sent_at),) = await office.rows("SELECT id, state, sent_at FROM emails")
        assert (state, sent_at is not None) == ("sent", True)
        assert taken.message["Message-ID"] == f"<{mail_id}@aap.test>"

    async def test_several_workers_send_each_mail_once(self, office: Office) -> None:
        organization_id = await office.organization()
        for number in range(12):
            await office.note(organization_id, f"in_{number}")
        assert sum(await asyncio.gather(*[office.send() for _ in range(4)])) == 12
        assert len({taken.message["Message-ID"] for taken in office.server.taken}) == len(office.server.taken) == 12

    async def test_what_is_refused_for_a_while_is_sent_later(self, office: Office) -> None:
        await office.note(await office.organization())
        office.server.refusals["RCPT"] = ["451 greylisted", "450 still"]
        for attempts in (1, 2):
            assert await office.send() == 0
            assert await office.send() == 0
            assert await office.rows() == [("new", attempts)]
            ((wait,),) = await office.rows("SELECT due_at - now() FROM emails")
            assert timedelta(seconds=50 * attempts) < wait < timedelta(seconds=60 * attempts + 1)
            await office.wait()
        assert await office.send() == 1
        assert await office.rows("SELECT state, attempts, problem FROM emails") == [("sent", 3, None)]

    async def test_a_server_that_is_down_is_not_asked_for_every_mail(
        self, office: Office, unused_tcp_port: int
    ) -> None:
        organization_id = await office.organization()
        for number in range(3):
            await office.note(organization_id, f"in_{number}")
        with capture_logs() as logs:
            assert await send_due(office.database, mailer_to(unused_tcp_port)) == 0
        assert [log["event"] for log in logs] == ["mail.delayed"]
        assert await office.rows() == [("new", 1), ("new", 0), ("new", 0)]
        assert await office.send() == 2

    async def test_a_mail_that_is_never_taken_is_given_up(self, office: Office) -> None:
        await office.note(await office.organization())
        office.server.refusals["RCPT"] = ["451 later"] * ATTEMPTS_MAX
        with capture_logs() as logs:
            for _ in range(ATTEMPTS_MAX):
                await office.send()
                await office.wait()
            assert await office.send() == 0
        assert await office.rows() == [("dead", ATTEMPTS_MAX)]
        assert logs[-1]["event"] == "mail.given_up"
        assert office.server.taken == []

    async def test_an_address_that_there_is_not_is_given_up_at_once(self, office: Office) -> None:
        await office.note(await office.organization())
        office.server.refusals["RCPT"] = ["550 nobody"]
        await office.send()
        assert await office.rows("SELECT state, problem FROM emails") == [("dead", "refused: 550 nobody")]

    @pytest.mark.parametrize("email", [None, "", "a@b.test, c@d.test", "a@b.test\r\nRCPT TO:<c@d.test>"])
    async def test_without_an_address_it_is_dead_and_told(self, office: Office, email: str | None) -> None:
        await office.note(await office.organization(email=email))
        await office.note(await office.organization())
        with capture_logs() as logs:
            assert await office.send() == 1
        assert await office.rows() == [("dead", 1), ("sent", 1)]
        given_up = [log for log in logs if log["event"] in {"mail.unaddressed", "mail.given_up"}]
        expected = "error" if email else "warning"
        assert [log["log_level"] for log in given_up] == [expected]
        assert "address" in given_up[0]["problem"]

    async def test_an_organization_that_has_no_account_for_billing_has_no_address(self, office: Office) -> None:
        organization_id = (await new_tenant(office.database, office.pepper)).organization_id
        await office.note(organization_id)
        assert await office.send() == 0
        assert await office.rows() == [("dead", 1)]

    async def test_a_name_makes_no_header(self, office: Office) -> None:
        """Guarantee: an organization's name is a part of the subject and of the text, whatever it holds."""
        name = "Acme\r\nBcc: eve@example.com\r\n\r\nPay here: evil"
        await office.note(await office.organization(name))
        assert await office.send() == 1
        (taken,) = office.server.taken
        assert (taken.recipients, taken.message["Bcc"]) == (["ada@acme.test"], None)
        assert taken.message["Subject"].endswith("of Acme Bcc: eve@example.com Pay here: evil")
        assert taken.text.startswith("Hello,\n\nthe payment")

    async def test_facts_that_are_not_understood_hold_up_nobody(self, office: Office) -> None:
        organization_id = await office.organization()
        await office.note(organization_id, "in_1", due_cents="much")
        await office.note(organization_id, "in_2", page_url="javascript:x")
        assert await office.send() == 1
        assert await office.rows() == [("dead", 1), ("sent", 1)]
        assert "javascript" not in office.server.taken[0].text

    async def test_a_connection_that_breaks_late_sends_the_same_mail_again(self, office: Office) -> None:
        """Guarantee: at least once; and what comes twice can be told to be one."""
        await office.note(await office.organization())
        office.server.breaks_after_data = 1
        assert await office.send() == 0
        await office.wait()
        assert await office.send() == 1
        first, again = office.server.taken
        assert first.source == again.source

    async def test_a_worker_that_died_leaves_its_mail_to_the_next(self, office: Office) -> None:
        await office.note(await office.organization())

        class Dying:
            async def send(self, mail: Mail) -> None:
                raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await send_due(office.database, Dying())
        assert await office.send() == 0
        await office.wait()
        assert await office.send() == 1

    async def test_without_a_server_the_log_has_it(self, office: Office) -> None:
        await office.note(await office.organization())
        with capture_logs() as logs:
            assert await send_due(office.database, LogMailer()) == 1
        assert [log["event"] for log in logs] == ["mail.written", "mail.done"]
        assert "1,234.56 USD" in logs[0]["text"]
        assert "stripe.com" not in logs[0]["text"]
        assert await office.rows() == [("sent", 1)]

    async def test_the_worker_process_sends(self, office: Office) -> None:
        await office.note(await office.organization())
        working = asyncio.create_task(office.worker.run())
        await eventually(lambda: office.server.taken)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


class TestLimits:
    async def allowance(self, office: Office, organization_id: OrganizationId, percent: int, **when: object) -> None:
        await office.run(
            "INSERT INTO allowance_events VALUES (:org, 'chat_requests', :starts, :percent, :used, 100, :at)",
            **{
                "org": organization_id,
                "percent": percent,
                "used": percent,
                "starts": datetime(2027, 1, 1, tzinfo=UTC),
                "at": NOW,
                **when,
            },
        )

    async def budget(self, office: Office, organization_id: OrganizationId, scope: str, *percents: int) -> None:
        values = {"id": f"bdgt_{scope}_{organization_id}"[:40], "org": organization_id, "scope": scope}
        await office.run(
            "INSERT INTO budgets (id, organization_id, scope, scope_id, period, limit_nano_usd, is_hard)"
            " VALUES (:id, :org, :scope, :org, 'month', 10000000000, true)",
            **values,
        )
        for percent in percents:
            await office.run(
                "INSERT INTO budget_events VALUES (:id, :starts, :percent, :org, :spent, 10000000000)",
                **{key: values[key] for key in ("id", "org")},
                starts=datetime(2027, 1, 1, tzinfo=UTC),
                percent=percent,
                spent=percent * 100_000_000 + 7,
            )

    async def test_each_threshold_of_an_allowance_is_told_once(self, office: Office) -> None:
        organization_id = await office.organization()
        await self.allowance(office, organization_id, 80)
        assert [await office.worker.note_limits() for _ in range(2)] == [1, 0]
        await office.send()
        await self.allowance(office, organization_id, 100)
        assert [await office.worker.note_limits() for _ in range(2)] == [1, 0]
        await office.send()
        first, second = (taken for taken in office.server.taken)
        assert first.message["Subject"] == "Acme has used 80 % of its chat requests"
        assert "80 of the 100 chat requests" in first.text
        assert "1 February 2027 at 00:00 UTC" in first.text
        assert second.message["Subject"] == "Acme has used 100 % of its chat requests"

    async def test_an_organizations_budget_is_told_and_no_other(self, office: Office) -> None:
        organization_id = await office.organization()
        await self.budget(office, organization_id, "organization", 50, 80, 100)
        await self.budget(office, organization_id, "project", 80)
        assert [await office.worker.note_limits() for _ in range(2)] == [1, 0]
        await office.send()
        (taken,) = office.server.taken
        assert "spent 10 of the 10 US dollars" in taken.text
        assert "Requests that no longer fit into it are refused." in taken.text

    async def test_what_is_long_past_is_no_news(self, office: Office) -> None:
        await self.allowance(office, await office.organization(), 80, at=NOW - timedelta(days=3))
        assert await office.worker.note_limits() == 0

    async def test_many_are_told_in_pages(self, office: Office) -> None:
        organization_id = await office.organization()
        await office.run(
            "INSERT INTO allowance_events SELECT :org, 'tokens', date '2000-01-01' + n, 80, 80, 100, now()"
            " FROM generate_series(1, 1001) AS n",
            org=organization_id,
        )
        assert await office.worker.note_limits() == 1_001


class TestTexts:
    def test_every_kind_has_one(self) -> None:
        trial = text_of("trial_ending", {"plan": "pro", "ends_at": "2027-02-03T04:05:00+00:00"}, "Acme")
        assert trial.subject == "The trial of Acme ends on 3 February 2027"
        assert "3 February 2027 at 04:05 UTC" in trial.body
        assert text_of("payment_recovered", INVOICE, "Acme").subject == "Payment received: invoice AB-1 of Acme"
        with pytest.raises(FactsUnreadable):
            text_of("birthday", {}, "Acme")

    async def test_what_billing_writes_down_can_be_read(self, office: Office) -> None:
        """Guarantee: the facts of `emails.note_invoice` are those that the texts take."""
        organization_id = await office.organization()
        stored = dict.fromkeys(Invoice.__struct_fields__)
        open_one = Invoice(
            **{
                **stored,
                "id": "in_1",
                "number": None,
                "status": "open",
                "attempts": 1,
                "due_cents": 99,
                "currency": "usd",
            }
        )
        async with office.database.transaction() as session:
            await emails.note_invoice(session, open_one, organization_id=organization_id)
            paid = msgspec.structs.replace(open_one, status="paid")
            await emails.note_invoice(session, paid, organization_id=organization_id)
        assert await office.send() == 2
        assert "0.99 USD for invoice in_1" in office.server.taken[0].text
