"""What `aap usage` does."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from core.money import parse_usd, usd_text
from gateway.cli.stores import Stores, chosen_organization, on_stores
from metering.summaries import Bucket, Usage, usage
from metering.summary_queries import Buckets, GroupField, UsageQuery

By = Literal["model", "project", "key", "day"]
_FIELDS: Final[dict[By, GroupField]] = {"model": "model", "project": "project_id", "key": "key_id"}
_DAY: Final = timedelta(days=1)
# Nobody waits for this process.
_GROUPS_MAX: Final = 1_000_000


class UsageRow(msgspec.Struct, frozen=True):
    """What one model, project, key or day used. Money is exact, in US dollars."""

    group: str
    requests: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    cost_usd: str
    charge_usd: str
    unpriced_requests: int


def summarise(org: str | None, first: datetime, last: datetime, by: By) -> list[UsageRow]:
    """Return what was used from *first* to *last*: days in order, anything else the dearest first."""
    if by == "day":
        query = UsageQuery(buckets=Buckets(first, _DAY, (last - first) // _DAY))
    else:
        query = UsageQuery(buckets=Buckets(first, last - first, 1), group_by=(_FIELDS[by],))

    async def act(stores: Stores) -> list[Bucket]:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            return await usage(session, query, organization_id=organization_id, groups_max=_GROUPS_MAX)

    found = [(bucket, used) for bucket in on_stores(act) for used in bucket.groups]
    if by != "day":
        found.sort(key=lambda pair: pair[1].charge_nano_usd, reverse=True)
    return [_row(_name(bucket, used, by), used) for bucket, used in found]


def total(rows: Sequence[UsageRow]) -> UsageRow:
    """Return the sum of *rows*."""
    return UsageRow(
        group="total",
        requests=sum(row.requests for row in rows),
        input_tokens=sum(row.input_tokens for row in rows),
        cached_input_tokens=sum(row.cached_input_tokens for row in rows),
        output_tokens=sum(row.output_tokens for row in rows),
        cost_usd=usd_text(sum(parse_usd(row.cost_usd) for row in rows)),
        charge_usd=usd_text(sum(parse_usd(row.charge_usd) for row in rows)),
        unpriced_requests=sum(row.unpriced_requests for row in rows),
    )


def _name(bucket: Bucket, used: Usage, by: By) -> str:
    if by == "day":
        return bucket.starts_at.strftime("%Y-%m-%d")
    return getattr(used, _FIELDS[by])


def _row(group: str, used: Usage) -> UsageRow:
    return UsageRow(
        group=group,
        requests=used.requests,
        input_tokens=used.units.all_input_tokens,
        cached_input_tokens=used.units.cached_input_tokens,
        output_tokens=used.units.all_output_tokens,
        cost_usd=usd_text(used.cost_nano_usd),
        charge_usd=usd_text(used.charge_nano_usd),
        unpriced_requests=used.unpriced_requests,
    )
