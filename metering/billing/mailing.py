"""Sends the mails that were written down (`metering/billing/emails.py`): each at least once, seldom twice.

A worker that dies between the server's "taken" and our row sends it again, with the same `Message-ID`, by which mail
programs tell that they have it. Any number of workers may run: a mail is leased to one at a time. The mail server down:
a mail is tried for a day and a half, further and further apart. PostgreSQL down: nothing is sent.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, Final

import msgspec
import structlog
from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from core.database import Database, database_now
from core.mail import Mail, Mailer, MailFailed
from keys.tables import OrganizationRow
from metering.billing.mail_texts import FactsUnreadable, text_of
from metering.billing.tables import BillingCustomerRow, EmailRow

ATTEMPTS_MAX: Final = 14
_LEASE: Final = timedelta(minutes=5)
"""Several times what a try may take (`core.smtp.SEND_SECONDS_MAX`)."""
_RETRY_MIN: Final = timedelta(minutes=1)
_RETRY_MAX: Final = timedelta(hours=6)
_log = structlog.get_logger(__name__)


class DueMail(msgspec.Struct, frozen=True, kw_only=True):
    """A mail that the caller alone is to send now. *address* is None where nobody is known to send it to."""

    id: str
    kind: str
    facts: Any
    attempts: int
    written_at: datetime
    organization_id: str
    organization: str
    address: str | None


async def send_due(database: Database, mailer: Mailer) -> int:
    """Send all mails that are due; return how many were. One that cannot be sent holds up no other.

    Where the server is what fails, the round ends: the others need not be tried. Errors: those of `core.database.DOWN`.
    """
    sent = 0
    while True:
        async with database.transaction() as session:
            due = await claim(session)
        if due is None:
            return sent
        try:
            await mailer.send(_mail(due))
        except MailFailed as error:
            await _note_failure(database, due, error)
            if error.is_servers:
                return sent
        else:
            await _note_sent(database, due)
            sent += 1


async def claim(session: AsyncSession) -> DueMail | None:
    """Return the mail that is due longest, for a lease the caller's alone. Each claim is an attempt."""
    row = await session.scalar(
        select(EmailRow)
        .where(EmailRow.state == "new", EmailRow.due_at <= func.now())
        .order_by(EmailRow.due_at, EmailRow.id)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    if row is None:
        return None
    row.attempts += 1
    row.due_at = await database_now(session) + _LEASE
    statement = (
        select(OrganizationRow.name, BillingCustomerRow.email)
        .outerjoin(BillingCustomerRow, BillingCustomerRow.organization_id == OrganizationRow.id)
        .where(OrganizationRow.id == row.organization_id)
    )
    name, address = (await session.execute(statement)).one()
    return DueMail(
        id=row.id,
        kind=row.kind,
        facts=row.facts,
        attempts=row.attempts,
        written_at=row.created_at,
        organization_id=row.organization_id,
        organization=name,
        address=address,
    )


def _mail(due: DueMail) -> Mail:
    """Return what is sent. Errors: MailFailed for what nobody could send."""
    if not due.address:
        raise MailFailed("the organization has no billing address for mail", is_final=True)
    try:
        subject, body = text_of(due.kind, due.facts, due.organization)
    except FactsUnreadable as error:
        raise MailFailed(f"not understood: {error}", is_final=True) from error
    return Mail(id=due.id, recipient=due.address, subject=subject, text=body, written_at=due.written_at)


async def _note_sent(database: Database, due: DueMail) -> None:
    async with database.transaction() as session:
        values = {"state": "sent", "sent_at": func.clock_timestamp(), "problem": None}
        await session.execute(update(EmailRow).where(EmailRow.id == due.id).values(values))
    _log.info("mail.done", mail_id=due.id, kind=due.kind, organization_id=due.organization_id)


async def _note_failure(database: Database, due: DueMail, error: MailFailed) -> None:
    """Try a mail again later, or give it up: at once where no try can help, else after ATTEMPTS_MAX."""
    is_given_up = error.is_final or due.attempts >= ATTEMPTS_MAX
    # That nobody has said where an organization's mails go is no failure of ours (`aap orgs set-email`).
    is_unaddressed = not due.address
    pause = min(_RETRY_MIN * 2 ** min(due.attempts - 1, 16), _RETRY_MAX)
    async with database.transaction() as session:
        due_at = await database_now(session) + pause
        values = {"state": "dead" if is_given_up else "new", "due_at": due_at, "problem": str(error)[:500]}
        await session.execute(update(EmailRow).where(EmailRow.id == due.id, EmailRow.state == "new").values(values))
    log = _log.error if is_given_up and not is_unaddressed else _log.warning
    event = "mail.unaddressed" if is_unaddressed else "mail.given_up" if is_given_up else "mail.delayed"
    log(event, mail_id=due.id, kind=due.kind, organization_id=due.organization_id, problem=str(error)[:500])
