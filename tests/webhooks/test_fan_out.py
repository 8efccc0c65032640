"""Organizations take turns in what their events cost."""

from __future__ import annotations

from collections import Counter
from itertools import cycle, islice

from core.ids import OrganizationId, new_id
from core.plain_sql import fetch
from tests.harness.webhook_place import new_endpoint, publish_many
from tests.webhooks.conftest import Own
from webhooks.endpoints import ENDPOINTS_MAX
from webhooks.fan_out import EVENTS_MAX, ORGANIZATIONS_MAX, FanOut

_SLOW = " && ".join(["contains(name, 'x') == `false`"] * 10)
"""A filter as long as they may be."""


async def waiting(own: Own) -> Counter[str]:
    """How many events wait, by organization."""
    async with own.database.transaction() as session:
        rows = await fetch(session, "SELECT organization_id FROM webhook_events WHERE NOT is_fanned_out")
    return Counter(row.organization_id for row in rows)


async def due(own: Own) -> Counter[str]:
    async with own.database.transaction() as session:
        return Counter(row.event_id for row in await fetch(session, "SELECT event_id FROM webhook_deliveries"))


async def test_a_flood_does_not_hold_up_another_organization(own: Own) -> None:
    other = await own.new_organization()
    await new_endpoint(own.database, "http://127.0.0.1:9/", other)
    await publish_many(own.database, [own.organization_id] * 3 * EVENTS_MAX)
    theirs = await publish_many(own.database, [other] * 3)
    done = await FanOut(own.database).once()
    assert await due(own) == Counter(theirs)
    assert done == (EVENTS_MAX // 2 + 3, True)


async def test_slow_filters_take_no_more_than_a_share_of_a_round(own: Own) -> None:
    """Guarantee: what an organization's filters cost is bounded; all of its events come to their turn."""
    for _ in range(ENDPOINTS_MAX):
        await new_endpoint(own.database, "http://127.0.0.1:9/", own.organization_id, filter=_SLOW)
    events = await publish_many(own.database, [own.organization_id] * 200)
    fan_out = FanOut(own.database)
    first = await fan_out.once()
    assert 0 < first.events < len(events)
    rounds = [first]
    while rounds[-1].has_more:
        rounds.append(await fan_out.once())
    assert sum(done.events for done in rounds) == len(events)
    assert await due(own) == Counter(dict.fromkeys(events, ENDPOINTS_MAX))


async def test_more_organizations_than_fit_into_a_round_all_have_their_turn(own: Own) -> None:
    """Guarantee: whoever comes last by name waits for no flood of those before."""
    crowd = [OrganizationId(new_id("org")) for _ in range(2 * ORGANIZATIONS_MAX + 10)]
    await publish_many(own.database, list(islice(cycle(crowd), 20 * len(crowd))))
    fan_out = FanOut(own.database)
    for _ in range(3):
        done = await fan_out.once()
        assert done.has_more
    assert max((await waiting(own)).values()) < 20


async def test_events_that_another_worker_has_locked_are_left_to_it(own: Own) -> None:
    other = await own.new_organization()
    await publish_many(own.database, [own.organization_id, other])
    async with own.database.transaction() as session:
        await fetch(session, "SELECT FROM webhook_events WHERE organization_id = $1 FOR UPDATE", other)
        assert await FanOut(own.database).once() == (1, False)
    assert await waiting(own) == {other: 1}
