"""Whether Stripe counted what it was told: hour by hour, our sum of an organization's meter against Stripe's.

Ours is what was reported as usage and could have arrived. Where Stripe has another sum, a repair is reported that makes
it ours: that is how a report of unknown outcome is settled, one that Stripe took and could not count later, and one
that somebody else made. Stripe sums a little later than it answers, so that a difference must stand for two looks, some
minutes apart, and the hour's last report be as old. What belongs to an invoice that is final cannot be repaired, and is
an alert, which a person looks at. Stripe down: the next round looks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Final

import msgspec
import structlog
from sqlalchemy import exists, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.clock import Clock
from core.database import Database
from core.ids import OrganizationId, new_id
from metering.billing import marks
from metering.billing.catalog_ids import meter_ids
from metering.billing.errors import StripeRefused
from metering.billing.moving import FINAL, move_unbilled, short_invoices
from metering.billing.planning import billed_periods, identifier_of
from metering.billing.stripe_api import StripeApi
from metering.billing.tables import (
    COUNTED_STATES,
    OPEN_STATES,
    BillingCustomerRow,
    InvoiceRow,
    MeterCheckRow,
    MeterCursorRow,
    MeterReportRow,
)
from metering.billing.windows import HOUR, PAST_MAX, hour_of

SETTLING: Final = timedelta(minutes=10)
"""How long a sum may take to be true: Stripe's documentation says minutes, and promises nothing."""
LOOK_BACK: Final = timedelta(days=3)
REPAIRS_MAX: Final = 3
"""Of an hour: what does not hold then is not a lost report."""
_IN_DOUBT: Final = ("waiting", "suspect", "repaired")
RECONCILED_MARK: Final = "reconciled"
"""When everybody was last compared to the end."""
_log = structlog.get_logger(__name__)


class Reconciled(msgspec.Struct, kw_only=True):
    """What a round has seen: hours by what was found, and the difference that stands, in the meters' units."""

    hours: int = 0
    waiting: int = 0
    repaired: int = 0
    alerts: int = 0
    refused: int = 0
    """Customers that Stripe does not know."""
    moved: int = 0
    """Final invoices that had not billed all that was reported: the rest goes to the next one."""
    difference: int = 0


class _Hour(msgspec.Struct, kw_only=True):
    """Our side of an hour."""

    value: int = 0
    is_open: bool = False
    """Something of it is on its way: no time to compare."""
    is_unknown: bool = False
    reports: int = 0
    event_at: datetime | None = None
    """The latest time in the hour that Stripe was told: it is in a billed period, which the hour's start may not be."""
    last_sent_at: datetime | None = None
    repairs: int = 0


class Reconciler:
    """Compares, and repairs. Errors: StripeFailed; those of `core.database.DOWN`."""

    def __init__(self, database: Database, api: StripeApi, clock: Clock) -> None:
        self._database = database
        self._api = api
        self._clock = clock

    async def round(
        self,
        *,
        only: OrganizationId | None = None,
        since: datetime | None = None,
        may_repair: bool = True,
        is_doubt_only: bool = False,
    ) -> Reconciled:
        """Compare the hours since then (three days, and all that is in doubt) of everybody, or of one.

        With *is_doubt_only* only those for whom something is in doubt, or an invoice is about to be final.
        """
        found = Reconciled()
        async with self._database.transaction() as session:
            ids = await meter_ids(session)
            customers = await _customers(session, self._clock.now(), only=only, is_doubt_only=is_doubt_only)
        for organization_id, meter, customer_id in customers:
            if meter not in ids:
                continue
            asked = _Asked(organization_id, meter, ids[meter], customer_id)
            try:
                await self._compare(asked, since, found, may_repair=may_repair)
            except StripeRefused as error:
                # A customer that was deleted at Stripe holds up no other.
                found.refused += 1
                _log.warning("stripe.refused", kind="customer", id=customer_id, code=error.code)
        if may_repair:
            found.moved = await self._move_unbilled(only)
        if only is None and not is_doubt_only:
            async with self._database.transaction() as session:
                await marks.set_moment(session, RECONCILED_MARK, self._clock.now())
        return found

    async def _move_unbilled(self, only: OrganizationId | None) -> int:
        """Move what final invoices have not billed to the next ones, each by itself; return how many that were."""
        now = self._clock.now()
        async with self._database.transaction() as session:
            invoices = await short_invoices(session, now, only=only)
        moved = 0
        for organization_id, invoice_id in invoices:
            async with self._database.transaction() as session:
                moved += await move_unbilled(session, invoice_id, now, organization_id=organization_id)
        return moved

    async def _compare(self, asked: _Asked, since: datetime | None, found: Reconciled, *, may_repair: bool) -> None:
        now = self._clock.now()
        async with self._database.transaction() as session:
            starts_at = since or await _first_in_doubt(session, asked, hour_of(now) - LOOK_BACK)
            ours = await _hours(session, asked, starts_at)
        if not ours:
            return
        ends_at = max(max(ours) + HOUR, hour_of(now) + HOUR)
        theirs = await self._api.hourly_sums(asked.meter_id, asked.customer_id, min(ours), ends_at)
        async with self._database.transaction() as session:
            closed = [p for p in await billed_periods(session, organization_id=asked.organization_id) if p.is_closed]
            for hour in sorted({*ours, *theirs}):
                mine = ours.get(hour, _Hour())
                told_at = mine.event_at or hour
                is_closed = any(p.starts_at <= told_at < p.ends_at for p in closed) or now - hour >= PAST_MAX
                look = _Look(hour, mine, theirs.get(hour, 0), is_closed)
                await _judge(session, asked, look, now, found, may_repair=may_repair)


async def _customers(
    session: AsyncSession, now: datetime, *, only: OrganizationId | None, is_doubt_only: bool
) -> list[tuple[OrganizationId, str, str]]:
    """Return whose meters are compared: organization, meter and customer."""
    cursor, customer = MeterCursorRow, BillingCustomerRow
    statement = (
        select(cursor.organization_id, cursor.meter, customer.stripe_customer_id)
        .join(customer, customer.organization_id == cursor.organization_id)
        .where(customer.stripe_customer_id.is_not(None))
    )
    if only is not None:
        statement = statement.where(cursor.organization_id == only)
    if is_doubt_only:
        own = MeterReportRow.organization_id == cursor.organization_id
        unknown = exists().where(own, MeterReportRow.state == "unknown")
        draft = exists().where(InvoiceRow.organization_id == cursor.organization_id, InvoiceRow.status == "draft")
        doubted = exists().where(
            MeterCheckRow.organization_id == cursor.organization_id, MeterCheckRow.state.in_(_IN_DOUBT)
        )
        lately = exists().where(
            InvoiceRow.organization_id == cursor.organization_id,
            InvoiceRow.status.in_(FINAL),
            InvoiceRow.issued_at >= now - timedelta(days=1),
        )
        statement = statement.where(or_(unknown, draft, doubted, lately))
    rows = await session.execute(statement)
    return [(OrganizationId(organization_id), meter, customer_id or "") for organization_id, meter, customer_id in rows]


class _Asked(msgspec.Struct, frozen=True):
    organization_id: OrganizationId
    meter: str
    meter_id: str
    customer_id: str


class _Look(msgspec.Struct, frozen=True):
    hour: datetime
    mine: _Hour
    theirs: int
    is_closed: bool


async def _first_in_doubt(session: AsyncSession, asked: _Asked, recent: datetime) -> datetime:
    """Return from when on to look: *recent*, or the oldest hour that something is unknown of."""
    own = (MeterReportRow.organization_id == asked.organization_id, MeterReportRow.meter == asked.meter)
    unknown = await session.scalar(
        select(func.min(MeterReportRow.event_at)).where(*own, MeterReportRow.state == "unknown")
    )
    checks = (MeterCheckRow.organization_id == asked.organization_id, MeterCheckRow.meter == asked.meter)
    doubted = await session.scalar(
        select(func.min(MeterCheckRow.hour)).where(*checks, MeterCheckRow.state.in_(_IN_DOUBT))
    )
    # Before an invoice is final, all that it bills is looked at.
    drafted = await session.scalar(
        select(func.min(InvoiceRow.usage_starts_at)).where(
            InvoiceRow.organization_id == asked.organization_id, InvoiceRow.status == "draft"
        )
    )
    # And once more after it is: what it has not billed is moved only where the sums agree.
    lately = await session.scalar(
        select(func.min(InvoiceRow.usage_starts_at)).where(
            InvoiceRow.organization_id == asked.organization_id,
            InvoiceRow.status.in_(FINAL),
            InvoiceRow.issued_at >= recent,
        )
    )
    in_doubt = [hour_of(moment) for moment in (unknown, doubted, drafted, lately) if moment is not None]
    return min([recent, *in_doubt])


async def _hours(session: AsyncSession, asked: _Asked, since: datetime) -> dict[datetime, _Hour]:
    """Return our side of each hour, by the time that Stripe was told."""
    rows = await session.scalars(
        select(MeterReportRow).where(
            MeterReportRow.organization_id == asked.organization_id,
            MeterReportRow.meter == asked.meter,
            MeterReportRow.event_at >= since,
            MeterReportRow.state.in_((*COUNTED_STATES, *OPEN_STATES)),
        )
    )
    hours: dict[datetime, _Hour] = {}
    for row in rows:
        hour = hours.setdefault(hour_of(row.event_at), _Hour())
        hour.is_open |= row.state in OPEN_STATES
        hour.is_unknown |= row.state == "unknown"
        moments = [moment for moment in (hour.last_sent_at, row.last_sent_at) if moment is not None]
        hour.last_sent_at = max(moments, default=None)
        hour.reports += 1
        hour.event_at = max(hour.event_at or row.event_at, row.event_at)
        if row.kind == "repair":
            hour.repairs += 1
        elif row.state in COUNTED_STATES:
            hour.value += row.value
    return hours


async def _judge(
    session: AsyncSession, asked: _Asked, look: _Look, now: datetime, found: Reconciled, *, may_repair: bool
) -> None:
    """Compare one hour, and write down or do what follows."""
    found.hours += 1
    difference = look.mine.value - look.theirs
    is_settling = look.mine.last_sent_at is not None and now - look.mine.last_sent_at < SETTLING
    if look.mine.is_open or (is_settling and difference):
        found.waiting += 1
        return
    row = await session.get(MeterCheckRow, (asked.organization_id, asked.meter, look.hour), with_for_update=True)
    if not difference:
        if row is not None and row.state != "agrees":
            row.state, row.ours, row.theirs, row.checked_at = "agrees", look.mine.value, look.theirs, now
        if look.mine.is_unknown and not is_settling:
            await _settle_unknown(session, asked, look.hour)
        return
    found.difference += difference
    is_same = row is not None and (row.ours, row.theirs) == (look.mine.value, look.theirs)
    stood = is_same and row is not None and now - row.seen_at >= SETTLING
    state = "waiting"
    # What we never reported is not ours to take back.
    if look.is_closed or look.mine.repairs >= REPAIRS_MAX or not look.mine.reports:
        is_decided = is_same and row is not None and row.state == "accepted"
        state = "accepted" if is_decided else "alert"
    elif stood and may_repair:
        await _repair(session, asked, look, difference, now)
        state = "repaired"
    seen_at = row.seen_at if is_same and row is not None and state != "repaired" else now
    is_news = row is None or row.state != state
    await _write(session, asked, look, state, seen_at, now)
    if state == "alert":
        # A person decides; nothing will become known by itself any more.
        await _settle_unknown(session, asked, look.hour)
    found.waiting += state == "waiting"
    found.repaired += state == "repaired"
    found.alerts += state == "alert"
    if state != "waiting" and is_news:
        _log.error(
            "meter_hour.differs",
            organization_id=asked.organization_id,
            meter=asked.meter,
            hour=look.hour.isoformat(),
            ours=look.mine.value,
            theirs=look.theirs,
            outcome=state,
        )


async def _repair(session: AsyncSession, asked: _Asked, look: _Look, difference: int, now: datetime) -> None:
    """Report what makes Stripe's sum ours. What was unknown is settled by it, whichever way it was."""
    number = look.mine.repairs + 1
    session.add(
        MeterReportRow(
            id=new_id("mrep"),
            organization_id=asked.organization_id,
            meter=asked.meter,
            window_starts_at=look.hour,
            # Below zero: a window's own revisions count up from one.
            revision=-number,
            kind="repair",
            event_at=look.mine.event_at or look.hour,
            value=difference,
            identifier=identifier_of(asked.organization_id, asked.meter, look.hour, f"repair{number}"),
            state="new",
            created_at=now,
        )
    )
    await _settle_unknown(session, asked, look.hour)
    await session.execute(
        update(MeterCursorRow)
        .where(MeterCursorRow.organization_id == asked.organization_id, MeterCursorRow.meter == asked.meter)
        .values(next_at=func.least(MeterCursorRow.next_at, look.hour))
    )


async def _settle_unknown(session: AsyncSession, asked: _Asked, hour: datetime) -> None:
    await session.execute(
        update(MeterReportRow)
        .where(
            MeterReportRow.organization_id == asked.organization_id,
            MeterReportRow.meter == asked.meter,
            MeterReportRow.event_at >= hour,
            MeterReportRow.event_at < hour + HOUR,
            MeterReportRow.state == "unknown",
        )
        .values(state="checked")
    )


async def _write(
    session: AsyncSession, asked: _Asked, look: _Look, state: str, seen_at: datetime, now: datetime
) -> None:
    values = {
        "ours": look.mine.value,
        "theirs": look.theirs,
        "state": state,
        "seen_at": seen_at,
        "checked_at": now,
    }
    await session.execute(
        insert(MeterCheckRow)
        .values(organization_id=asked.organization_id, meter=asked.meter, hour=look.hour, **values)
        .on_conflict_do_update(
            index_elements=[MeterCheckRow.organization_id, MeterCheckRow.meter, MeterCheckRow.hour], set_=values
        )
    )


async def mark_suspect(session: AsyncSession, starts_at: datetime, ends_at: datetime, now: datetime) -> int:
    """Mark the hours whose reports came in that time: Stripe could not count some of them. Returns how many hours.

    Stripe names samples only, so that everybody's reports of that time are in doubt.
    """
    rows = await session.execute(
        select(MeterReportRow.organization_id, MeterReportRow.meter, MeterReportRow.event_at)
        .where(
            MeterReportRow.last_sent_at >= starts_at - HOUR,
            MeterReportRow.last_sent_at <= ends_at + HOUR,
            MeterReportRow.state.in_(COUNTED_STATES),
        )
        .distinct()
    )
    doubted = {(organization_id, meter, hour_of(event_at)) for organization_id, meter, event_at in rows}
    await _doubt(session, doubted, now)
    return len(doubted)


async def _doubt(session: AsyncSession, doubted: Iterable[tuple[str, str, datetime]], now: datetime) -> None:
    for organization_id, meter, hour in sorted(doubted):
        values: Mapping[str, object] = {"state": "suspect", "seen_at": now, "checked_at": now}
        await session.execute(
            insert(MeterCheckRow)
            .values(organization_id=organization_id, meter=meter, hour=hour, ours=0, theirs=0, **values)
            .on_conflict_do_update(
                index_elements=[MeterCheckRow.organization_id, MeterCheckRow.meter, MeterCheckRow.hour],
                set_=dict(values),
            )
        )
