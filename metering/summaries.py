"""Usage and costs by time: what the usage API, the command line and the portal show. Sums of entries, never entries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal

import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from core.errors import Invalid
from core.ids import OrganizationId
from metering.summary_queries import SUM_NAMES, Buckets, GroupField, UsageQuery, select_sums
from metering.usage import NO_UNITS, Units

Width = Literal["1m", "1h", "1d"]
# What one answer may hold: building it blocks the process for about 50 ms.
GROUPS_MAX: Final = 10_000
_PAGE: Final = re.compile(r"page_([0-9a-f]{9})", re.ASCII)


class PageLimits(msgspec.Struct, frozen=True):
    """How many buckets a page has unless it is told, and at most."""

    default: int
    maximum: int


WIDTHS: Final[dict[Width, timedelta]] = {
    "1m": timedelta(minutes=1),
    "1h": timedelta(hours=1),
    "1d": timedelta(days=1),
}
# OpenAI's document, /organization/usage/* and /organization/costs.
USAGE_LIMITS: Final[dict[Width, PageLimits]] = {
    "1m": PageLimits(60, 1440),
    "1h": PageLimits(24, 168),
    "1d": PageLimits(7, 31),
}
COSTS_LIMITS: Final[dict[Width, PageLimits]] = {"1d": PageLimits(7, 180)}


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What one group used in one bucket. What it was not grouped by is None."""

    project_id: str | None = None
    key_id: str | None = None
    model: str | None = None
    service_tier: str | None = None
    is_batch: bool | None = None
    requests: int = 0
    unpriced_requests: int = 0
    cost_nano_usd: int = 0
    charge_nano_usd: int = 0
    units: Units = NO_UNITS


class Bucket(msgspec.Struct, frozen=True):
    """A stretch of time and what was used in it, by group. No usage: no groups."""

    starts_at: datetime
    ends_at: datetime
    groups: list[Usage]


class PageRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Which page of buckets is asked for. Times are Unix seconds that a datetime can hold; the end is exclusive.

    Without an end, it is now; without a limit, it is the width's default.
    """

    start_time: int
    end_time: int | None = None
    width: Width = "1d"
    limit: int | None = None
    page: str | None = None


class PageRange(msgspec.Struct, frozen=True):
    """The buckets of one page, and where those of the last page end."""

    buckets: Buckets
    ends_at: datetime


async def usage(
    session: AsyncSession, query: UsageQuery, *, organization_id: OrganizationId, groups_max: int = GROUPS_MAX
) -> list[Bucket]:
    """Return what the organization used, in every bucket of *query* from the first one on.

    They are fewer than asked for when together they would have more than *groups_max* groups: ask again for the rest.
    Errors: Invalid when one bucket alone has more.
    """
    if query.operations == () or not query.buckets.count:
        return _buckets(query, [], query.buckets.count)
    statement = select_sums(query, organization_id=organization_id, rows_max=groups_max + 1)
    rows = (await session.execute(statement)).all()
    count = query.buckets.count
    if len(rows) > groups_max:
        # The last bucket may go on behind the last row.
        count = (rows[-1].bucket_at - query.buckets.starts_at) // query.buckets.width
        if count == 0:
            raise Invalid(f"More than {groups_max} groups in one bucket: group by less, or filter.", param="group_by")
    return _buckets(query, rows, count)


def _buckets(query: UsageQuery, rows: Sequence[Any], count: int) -> list[Bucket]:
    asked = query.buckets
    starts = [asked.starts_at + asked.width * number for number in range(count)]
    buckets = {start: Bucket(start, start + asked.width, []) for start in starts}
    groups = len(query.group_by)
    for row in rows:
        sums = row[1 + groups :]
        # Calls that a provider refused are entries, and no usage.
        if any(sums) and row[0] in buckets:
            buckets[row[0]].groups.append(_usage(dict(zip(query.group_by, row[1:], strict=False)), sums))
    return list(buckets.values())


def _usage(group: dict[GroupField, Any], sums: Sequence[int]) -> Usage:
    named: dict[str, Any] = dict(zip(SUM_NAMES, sums, strict=True))
    units = Units(**{name: named.pop(name) for name in Units.__struct_fields__})
    return Usage(**group, **named, units=units)


def page_range(asked: PageRequest, limits: dict[Width, PageLimits], *, now: datetime) -> PageRange:
    """Return the buckets of the page, whole ones: the first holds the start, the last the moment before the end.

    Errors: Invalid, which names the parameter.
    """
    if asked.end_time is not None and asked.end_time <= asked.start_time:
        raise Invalid("Invalid 'end_time': it must be later than 'start_time'.", param="end_time")
    seconds = WIDTHS[asked.width] // timedelta(seconds=1)
    first = asked.start_time // seconds * seconds
    end = int(now.timestamp()) + 1 if asked.end_time is None else asked.end_time
    last = -(-end // seconds) * seconds
    start = first if asked.page is None else _page_start(asked.page)
    if asked.page is not None and not (first < start < last and start % seconds == 0):
        raise _unknown_page()
    count = min(_limit(asked, limits[asked.width]), max(0, (last - start) // seconds))
    return PageRange(Buckets(_moment(start), WIDTHS[asked.width], count), _moment(last))


def next_page(page: PageRange, buckets: Sequence[Bucket]) -> str | None:
    """Return what to ask for behind *buckets*, None when they are the last ones."""
    if not buckets or buckets[-1].ends_at >= page.ends_at:
        return None
    return f"page_{int(buckets[-1].ends_at.timestamp()):09x}"


def _limit(asked: PageRequest, limits: PageLimits) -> int:
    limit = limits.default if asked.limit is None else asked.limit
    if not 1 <= limit <= limits.maximum:
        message = f"Invalid 'limit': it ranges from 1 to {limits.maximum} for buckets of {asked.width}."
        raise Invalid(message, param="limit")
    return limit


def _page_start(page: str) -> int:
    found = _PAGE.fullmatch(page)
    if found is None:
        raise _unknown_page()
    return int(found[1], 16)


def _unknown_page() -> Invalid:
    return Invalid("Invalid 'page': expected the 'next_page' of an answer to the same query.", param="page")


def _moment(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
