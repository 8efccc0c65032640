"""From the ledger's windows to reports: the outbox towards Stripe, one organization and meter at a time.

A report and what it covers are written in one transaction, before Stripe hears of it, so that whoever sends it, and how
often, tells the same. Less than a unit of the meter is carried on: all reports together are what the ledger has,
rounded down once. Whoever plans holds the cursor's row.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from sqlalchemy import and_, delete, func, or_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import OrganizationId, new_id
from metering.billing import wallet
from metering.billing.account_status import RENEWED
from metering.billing.meters import METERS, USAGE, VALUE_MAX, Meter
from metering.billing.tables import (
    BillingCustomerRow,
    BillingPeriodRow,
    MeterCursorRow,
    MeterReportRow,
    MeterWindowRow,
    SubscriptionRow,
    UncollectedUsageRow,
)
from metering.billing.windows import HOUR, DueUsage, Hour, Period, Uncollected, due_windows, hour_of
from metering.tables import SpendWindowRow

_FAR: Final = datetime(9999, 1, 1, tzinfo=UTC)
RECENT: Final = timedelta(days=3)
"""How far back each turn looks; once a day, and before an invoice, it looks at all that is still billed."""
_SCAN_EVERY: Final = timedelta(days=1)
_SCAN_BACK: Final = timedelta(days=70)
"""Two periods of a month, and a little: what is settled later than that is for an operator to see."""


async def plan_reports(session: AsyncSession, cursor: MeterCursorRow, now: datetime, *, limit: int) -> bool:
    """Write reports for the usage of *limit* windows at most that have none yet; tell whether there are more.

    Usage that no invoice takes any more is written down for the operator. *cursor*, and the organization's account
    (`ownership.lock_account`), are locked by this transaction.
    """
    meter = METERS[cursor.meter]
    organization_id = OrganizationId(cursor.organization_id)
    periods = await billed_periods(session, organization_id=organization_id)
    if not periods:
        # Nothing is anybody's to pay: an invoice that waits has nothing to wait for.
        cursor.is_flush_due = False
        return False
    is_whole = cursor.is_flush_due or cursor.scanned_at is None or now - cursor.scanned_at >= _SCAN_EVERY
    earliest = max(hour_of(min(period.starts_at for period in periods)), hour_of(now) - _SCAN_BACK)
    noted = await _noted(session, meter, organization_id=organization_id)
    since = min([earliest, *map(hour_of, noted)]) if is_whole else max(earliest, hour_of(now) - RECENT)
    hours = await _hours(session, meter, since, periods, organization_id=organization_id)
    rows = await _planned(session, meter, since, organization_id=organization_id)
    due, uncollected = due_windows(
        hours,
        {starts_at: row.planned for starts_at, row in rows.items()},
        periods,
        now,
        is_flush=cursor.is_flush_due,
    )
    writer = _Writer(session, cursor, meter, rows, now, credit=await _credit(session, meter, organization_id))
    for one in due[:limit]:
        await writer.write(one)
    if len(due) > limit:
        await session.flush()
        return True
    # What an operator was told of stays so while the next period is unknown.
    late = [one for one in uncollected if not one.is_later or one.window_starts_at in noted]
    rest = [one if one.window_starts_at in noted else await writer.draw_late(one) for one in late]
    await _note_uncollected(session, meter, rest, since, now, organization_id=organization_id)
    cursor.is_flush_due = False
    if is_whole:
        cursor.scanned_at = now
    await session.flush()
    return False


async def billed_periods(session: AsyncSession, *, organization_id: OrganizationId) -> list[Period]:
    """Return the times in which an organization's usage is somebody's business: billed, included, or prepaid.

    Behind each subscription that goes on there is one of which nothing is known yet.
    """
    rows = await session.scalars(
        select(BillingPeriodRow)
        .where(BillingPeriodRow.organization_id == organization_id)
        .order_by(BillingPeriodRow.starts_at)
    )
    periods = [
        Period(
            starts_at=row.starts_at,
            ends_at=row.ends_at,
            is_closed=row.is_closed or row.is_handed_over,
            is_included=not (row.is_metered or row.is_handed_over),
            is_trial=row.is_trial,
        )
        for row in rows
    ]
    # Stripe tells of a period when it has begun.
    unknown_from = await session.scalars(
        select(SubscriptionRow.period_ends_at).where(
            SubscriptionRow.organization_id == organization_id,
            SubscriptionRow.status.in_(RENEWED),
            SubscriptionRow.ended_at.is_(None),
        )
    )
    periods += [Period(starts_at=starts_at, ends_at=_FAR, is_pending=True) for starts_at in unknown_from]
    opened_at = await session.scalar(
        select(BillingCustomerRow.wallet_opened_at).where(BillingCustomerRow.organization_id == organization_id)
    )
    if opened_at is not None:
        periods.append(Period(starts_at=opened_at, ends_at=_FAR, is_prepaid=True))
    return periods


async def owed(session: AsyncSession, now: datetime, *, credit: int, organization_id: OrganizationId) -> int:
    """Return what *credit* is still to pay of usage, in nano-USD; that of the present hour included."""
    periods = await billed_periods(session, organization_id=organization_id)
    if not periods:
        return 0
    since = max(hour_of(min(period.starts_at for period in periods)), hour_of(now) - _SCAN_BACK)
    hours = await _hours(session, USAGE, since, periods, organization_id=organization_id)
    rows = await _planned(session, USAGE, since, organization_id=organization_id)
    planned = {starts_at: row.planned for starts_at, row in rows.items()}
    due, uncollected = due_windows(hours, planned, periods, now, is_flush=True)
    total = sum(one.amount for one in due if one.event_at is not None and not one.is_free)
    noted = await _noted(session, USAGE, organization_id=organization_id)
    late = sum(
        max(one.amount, 0)
        for one in uncollected
        if one.may_be_drawn and not one.is_later and one.window_starts_at not in noted
    )
    return total + min(late, max(credit - total, 0))


async def _noted(session: AsyncSession, meter: Meter, *, organization_id: OrganizationId) -> set[datetime]:
    """Return the windows of which usage is known to be uncollected, and waits for the operator to decide."""
    rows = await session.scalars(
        select(UncollectedUsageRow.window_starts_at).where(
            UncollectedUsageRow.organization_id == organization_id,
            UncollectedUsageRow.meter == meter.event_name,
            UncollectedUsageRow.accepted_at.is_(None),
        )
    )
    return set(rows)


async def _hours(
    session: AsyncSession,
    meter: Meter,
    since: datetime,
    periods: Sequence[Period],
    *,
    organization_id: OrganizationId,
) -> list[Hour]:
    """Return what the ledger has by hour, and by minute of those hours that a period's bound falls into."""
    cut = {hour_of(bound) for period in periods for bound in (period.starts_at, period.ends_at)}
    window = SpendWindowRow
    hourly = and_(window.seconds == 3600, window.starts_at >= since)
    by_minute = [
        and_(window.seconds == 60, window.starts_at >= hour, window.starts_at < hour + HOUR)
        for hour in cut
        if since <= hour < _FAR
    ]
    # In one statement: a settlement between two would make an hour look as if its minutes were forgotten.
    rows = await session.execute(
        select(window.seconds, window.starts_at, func.sum(meter.total()))
        .where(window.organization_id == organization_id, or_(hourly, *by_minute))
        .group_by(window.seconds, window.starts_at)
    )
    totals: dict[datetime, int] = {}
    minutes: dict[datetime, dict[datetime, int]] = {}
    for seconds, starts_at, total in rows:
        if seconds == 3600:
            totals[starts_at] = int(total)
        else:
            minutes.setdefault(hour_of(starts_at), {})[starts_at] = int(total)
    return [
        Hour(starts_at=starts_at, total=total, minutes=minutes.get(starts_at, {}))
        for starts_at, total in totals.items()
    ]


async def _planned(
    session: AsyncSession, meter: Meter, since: datetime, *, organization_id: OrganizationId
) -> dict[datetime, MeterWindowRow]:
    rows = await session.scalars(
        select(MeterWindowRow).where(
            MeterWindowRow.organization_id == organization_id,
            MeterWindowRow.meter == meter.event_name,
            MeterWindowRow.starts_at >= since,
        )
    )
    return {row.starts_at: row for row in rows}


async def _credit(session: AsyncSession, meter: Meter, organization_id: OrganizationId) -> int:
    """Return the prepaid credit in the meter's unit."""
    if not meter.bills:
        return 0
    return await wallet.balance(session, organization_id=organization_id) // meter.per_unit


class _Writer:
    """Writes reports, one after the other: each takes what the one before has left."""

    def __init__(
        self,
        session: AsyncSession,
        cursor: MeterCursorRow,
        meter: Meter,
        windows: dict[datetime, MeterWindowRow],
        now: datetime,
        *,
        credit: int,
    ) -> None:
        self._session = session
        self._cursor = cursor
        self._meter = meter
        self._windows = windows
        self._now = now
        self._credit = credit

    async def write(self, due: DueUsage) -> None:
        """Plan one window's usage: a report of it, unless it comes to less than a unit or is nobody's to pay."""
        window = self._window(due.window_starts_at)
        window.planned += due.amount
        if due.event_at is None:
            return
        value, self._cursor.remainder = divmod(self._cursor.remainder + due.amount, self._meter.per_unit)
        if not value:
            return
        drawn = await self._drawn(value, due)
        window.revisions += 1
        report = MeterReportRow(
            id=new_id("mrep"),
            organization_id=self._cursor.organization_id,
            meter=self._meter.event_name,
            window_starts_at=due.window_starts_at,
            revision=window.revisions,
            kind="carried" if due.is_carried else "usage",
            event_at=due.event_at,
            value=value - drawn,
            drawn=drawn,
            identifier=identifier_of(
                self._cursor.organization_id, self._meter.event_name, due.window_starts_at, window.revisions
            ),
            state="new" if value != drawn else "settled",
            created_at=self._now,
        )
        assert abs(report.value) <= VALUE_MAX
        self._session.add(report)
        if drawn:
            await self._session.flush()
            await wallet.draw(
                self._session,
                drawn * self._meter.per_unit,
                source=report.id,
                organization_id=OrganizationId(self._cursor.organization_id),
            )

    async def draw_late(self, late: Uncollected) -> Uncollected:
        """Have credit pay what came too late for every invoice, as far as it goes now; return the rest.

        Only where there was credit at the time, and once: what is bought later is for what is used later. Of what is
        taken back, credit gets what it paid.
        """
        if not (self._meter.bills and late.may_be_drawn):
            return late
        unit = self._meter.per_unit
        if late.amount > 0:
            part = min(late.amount, max(self._credit, 0) * unit)
        else:
            part = max(late.amount, -await self._paid_of(late.window_starts_at) * unit)
        if part:
            await self.write(
                DueUsage(
                    window_starts_at=late.window_starts_at,
                    amount=part,
                    event_at=hour_of(self._now),
                    is_carried=True,
                    is_prepaid=True,
                )
            )
        return Uncollected(window_starts_at=late.window_starts_at, amount=late.amount - part)

    async def _drawn(self, value: int, due: DueUsage) -> int:
        """Return how much of *value* prepaid credit pays: as far as it goes, or all where nothing else does.

        Of what is taken back, credit gets what it paid of that window.
        """
        if not self._meter.bills or due.is_free:
            return 0
        if due.is_prepaid:
            drawn = value
        elif value < 0:
            drawn = -min(-value, await self._paid_of(due.window_starts_at))
        else:
            drawn = min(max(self._credit, 0), value)
        self._credit -= drawn
        return drawn

    async def _paid_of(self, window_starts_at: datetime) -> int:
        """Return what credit has paid of a window."""
        await self._session.flush()
        total = await self._session.scalar(
            select(func.coalesce(func.sum(MeterReportRow.drawn), 0)).where(
                MeterReportRow.organization_id == self._cursor.organization_id,
                MeterReportRow.meter == self._meter.event_name,
                MeterReportRow.window_starts_at == window_starts_at,
            )
        )
        return max(int(total or 0), 0)

    def _window(self, starts_at: datetime) -> MeterWindowRow:
        row = self._windows.get(starts_at)
        if row is None:
            row = self._windows[starts_at] = MeterWindowRow(
                organization_id=self._cursor.organization_id,
                meter=self._meter.event_name,
                starts_at=starts_at,
                planned=0,
                revisions=0,
            )
            self._session.add(row)
        return row


def identifier_of(organization_id: str, event_name: str, window_starts_at: datetime, revision: int | str) -> str:
    """Return how Stripe knows a report: the same however often it is made, another for another revision."""
    return f"{organization_id}:{event_name}:{window_starts_at:%Y%m%dT%H%MZ}:{revision}"


async def open_cursors(session: AsyncSession, meters: Sequence[Meter], *, organization_id: OrganizationId) -> None:
    """Have an organization's usage reported from now on. Changes nothing where it is already."""
    rows = [{"organization_id": organization_id, "meter": meter.event_name} for meter in meters]
    await session.execute(insert(MeterCursorRow).values(rows).on_conflict_do_nothing())


async def _note_uncollected(
    session: AsyncSession,
    meter: Meter,
    uncollected: Sequence[Uncollected],
    since: datetime,
    now: datetime,
    *,
    organization_id: OrganizationId,
) -> None:
    """Write down what no invoice takes any more, in the place of what was written down before of the same time."""
    own = (
        UncollectedUsageRow.organization_id == organization_id,
        UncollectedUsageRow.meter == meter.event_name,
        UncollectedUsageRow.window_starts_at >= since,
        UncollectedUsageRow.accepted_at.is_(None),
    )
    await session.execute(delete(UncollectedUsageRow).where(*own))
    for one in uncollected:
        if not one.amount:
            continue
        values = {"amount": one.amount, "seen_at": now, "accepted_at": None}
        key = {
            "organization_id": organization_id,
            "meter": meter.event_name,
            "window_starts_at": one.window_starts_at,
        }
        await session.execute(
            insert(UncollectedUsageRow)
            .values(**key, **values)
            .on_conflict_do_update(index_elements=list(key), set_=values)
        )
