"""Calls whose gateway died become estimated entries; those of living gateways are left alone."""

from __future__ import annotations

import msgspec
import pytest

from core.database import Database
from core.ids import new_id
from metering.entries import INTEND, LOST, SETTLE, intend_arguments, settle_arguments
from metering.prices import add_price
from metering.rating import PriceTerms, Rates, Step
from metering.sweeper import sweep
from metering.usage import Media, Units
from tests.metering.conftest import Books

LEASE = 15.0


@pytest.fixture(autouse=True)
async def a_server_that_has_been_up_for_long(books: Books) -> None:
    """A lease is granted to everybody after a start of PostgreSQL: this one's was longer ago than any lease here."""
    [[seconds]] = await books.run("SELECT extract(epoch FROM now() - pg_postmaster_start_time())::float8")
    assert seconds > 0


async def intend(books: Books, gateway: str, *, age: float, seen: float | None, output: int = 0) -> str:
    """An intent that was last checkpointed *age* seconds ago, of a gateway last heard of *seen* seconds ago."""
    intent = books.intent(prompt=100)
    await books.run(INTEND, *intend_arguments(gateway, [intent]))
    await books.run(
        "UPDATE usage_intents SET checkpoint_at = now() - make_interval(secs => $2), observed_output_tokens = $3"
        " WHERE request_id = $1",
        intent.request_id,
        age,
        output,
    )
    if seen is not None:
        await books.run(
            "INSERT INTO gateway_leases VALUES ($1, now() - make_interval(secs => $2))"
            " ON CONFLICT (gateway_id) DO UPDATE SET seen_at = excluded.seen_at",
            gateway,
            seen,
        )
    return intent.request_id


async def swept(books: Books, lease_seconds: float = 0.0) -> list[str]:
    await sweep(books.run, lease_seconds=lease_seconds)
    return [str(entry["request_id"]) for entry in await books.entries()]


async def test_a_dead_gateways_call_is_billed_its_prompt_and_what_was_seen_of_its_output(
    books: Books, database: Database
) -> None:
    async with database.transaction() as session:
        rates = Rates(input_tokens=10**9, output_tokens=3 * 10**9)
        price = await add_price(session, new_id("m"), PriceTerms(tiers={"default": (Step(rates=rates),)}))
    books.price_id = price.id
    await intend(books, new_id("gw"), age=20, seen=20, output=40)
    await swept(books)
    [entry] = await books.entries()
    assert (entry["input_tokens"], entry["output_tokens"], entry["quality"]) == (100, 40, "estimated")
    assert entry["cost_nano_usd"] == entry["charge_nano_usd"] == 100 * 1000 + 40 * 3000
    assert (entry["outcome"], entry["requests"], entry["is_unpriced"]) == (LOST, 1, False)
    assert await books.intents() == []


async def swept_media(
    books: Books, database: Database, media: Media, rates: Rates | None, *, prompt: int = 0
) -> dict[str, object]:
    """What becomes of a lost call for *media* whose price is *rates*; None: a price that nobody knows."""
    books.price_id = "price_unknown"
    if rates is not None:
        async with database.transaction() as session:
            terms = PriceTerms(tiers={"default": (Step(rates=rates),)})
            books.price_id = (await add_price(session, new_id("m"), terms)).id
    lost = msgspec.structs.replace(books.intent(prompt=prompt), media=media)
    # Beside another one: what many calls have in common is sent once, and this is not.
    await books.run(INTEND, *intend_arguments(new_id("gw"), [books.intent(prompt=0), lost]))
    await books.run(
        "UPDATE usage_intents SET checkpoint_at = '2026-01-01' WHERE organization_id = $1", books.tenant.organization_id
    )
    await swept(books)
    found = {str(entry["request_id"]): entry for entry in await books.entries()}
    mine = found.pop(lost.request_id)
    [other] = found.values()
    assert (other["images"], other["audio_seconds"], other["cost_nano_usd"]) == (0, 0, 0)
    return mine


async def test_a_lost_call_for_pictures_is_billed_the_pictures(books: Books, database: Database) -> None:
    entry = await swept_media(books, database, Media(2, 0), Rates(images=40_000_000 * 10**6))
    assert (entry["images"], entry["cost_nano_usd"]) == (2, 80_000_000)


async def test_a_lost_call_for_pictures_that_are_priced_by_tokens_is_billed_its_prompt(
    books: Books, database: Database
) -> None:
    entry = await swept_media(books, database, Media(2, 0), Rates(input_tokens=10**9), prompt=7)
    assert (entry["images"], entry["input_tokens"], entry["cost_nano_usd"]) == (0, 7, 7_000)


@pytest.mark.parametrize("rates", [None, Rates(input_tokens=10**9, output_tokens=10**9)])
async def test_a_lost_recording_that_its_price_does_not_know_is_unpriced(
    books: Books, database: Database, rates: Rates | None
) -> None:
    """Guarantee: what cannot be rated is never free, and keeps what is known of it."""
    entry = await swept_media(books, database, Media(0, 101), rates)
    assert (entry["audio_seconds"], entry["is_unpriced"]) == (101, True)


async def test_who_is_alive_keeps_its_calls(books: Books) -> None:
    alive = await intend(books, new_id("gw"), age=0.5, seen=0.5)
    assert await swept(books, 5.0) == []
    assert [row["request_id"] for row in await books.intents()] == [alive]


async def test_a_call_that_its_living_gateway_no_longer_knows_is_swept(books: Books) -> None:
    """Guarantee: an intent that arrived behind its own settlement does not stay for ever."""
    forgotten = await intend(books, new_id("gw"), age=90, seen=0)
    assert await swept(books, 10_000.0) == [forgotten]


async def test_a_call_that_is_entered_already_only_loses_its_intent(books: Books) -> None:
    request_id = await intend(books, new_id("gw"), age=20, seen=None)
    entry = books.entry(request_id, units=Units(input_tokens=1))
    await books.run(SETTLE, *settle_arguments([entry]))
    await intend(books, new_id("gw"), age=20, seen=None)
    await books.run(
        "UPDATE usage_intents SET request_id = $1 WHERE organization_id = $2", request_id, books.tenant.organization_id
    )
    assert await swept(books) == [request_id]
    [found] = await books.entries()
    assert (found["input_tokens"], found["quality"]) == (1, "exact")
    assert await books.intents() == []


async def test_a_postgresql_that_has_just_started_gives_everybody_the_time_of_a_lease(books: Books) -> None:
    request_id = await intend(books, new_id("gw"), age=3_000_000, seen=3_000_000)
    [[up]] = await books.run("SELECT extract(epoch FROM now() - pg_postmaster_start_time())::float8")
    assert await swept(books, up + 100) == []
    assert await swept(books, 0.0) == [request_id]


async def test_a_price_that_cannot_be_read_does_not_stop_the_others(books: Books, database: Database) -> None:
    """Guarantee: a later release's price, left behind by a rollback, makes its own calls unpriced and no more."""
    async with database.transaction() as session:
        terms = PriceTerms(tiers={"default": (Step(rates=Rates(input_tokens=10**9, output_tokens=10**9)),)})
        price = await add_price(session, new_id("m"), terms)
    [row] = await books.run("SELECT * FROM prices WHERE id = $1", price.id)
    later = {**dict(row), "id": new_id("price"), "terms": '{"tiers": {}, "of_a_later_release": 1}'}
    names = ", ".join(later)
    values = ", ".join(f"${number}" for number in range(1, len(later) + 1))
    await books.run(f"INSERT INTO prices ({names}) VALUES ({values})", *later.values())
    books.price_id = later["id"]
    unreadable = await intend(books, new_id("gw"), age=20, seen=20)
    books.price_id = price.id
    readable = await intend(books, new_id("gw"), age=20, seen=20)
    await swept(books)
    found = {entry["request_id"]: entry["is_unpriced"] for entry in await books.entries()}
    assert found == {unreadable: True, readable: False}
