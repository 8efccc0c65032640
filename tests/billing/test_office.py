"""The office's part of a worker process, as it is started: mails, metrics and plans' prices, without Stripe."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sqlalchemy import text

from core.database import Database
from core.settings import load
from gateway import back_office
from metering.billing import emails
from tests.harness.billing import empty
from tests.harness.eventually import eventually
from tests.harness.stores import TestStores
from tests.harness.tenant import new_tenant


async def test_everything_is_done_without_stripe(
    books: Database, books_url: str, stores: TestStores, tmp_path: Path
) -> None:
    await empty(books)
    path = tmp_path / "aap.toml"
    path.write_text('[plans.office.prices.m]\ninput_usd_per_million = "0.50"')
    organization_id = (await new_tenant(books, stores.pepper)).organization_id
    async with books.transaction() as session:
        await session.execute(
            text("INSERT INTO billing_customers (organization_id, email) VALUES (:org, 'a@b.test')"),
            {"org": organization_id},
        )
        facts: dict[str, object] = {"plan": "pro", "ends_at": "2027-01-01T00:00:00Z"}
        await emails.note(session, "trial_ending", "sub_1:1", facts, organization_id=organization_id)
    settings = load({**stores.environ(), "DATABASE_URL": books_url, "AAP_CONFIG": str(path)})
    assert settings.stripe.api_key is None
    working = asyncio.create_task(back_office.run(settings))

    async def done() -> bool:
        query = (
            "SELECT (SELECT state FROM emails), (SELECT count(*) FROM daily_metrics),"
            " (SELECT count(*) FROM prices WHERE plan = 'office')"
        )
        async with books.transaction() as session:
            return tuple((await session.execute(text(query))).one()) == ("sent", 35, 1)

    try:
        await eventually(done, 20)
    finally:
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        await empty(books)
        async with books.transaction() as session:
            await session.execute(text("TRUNCATE daily_metrics, mrr_snapshots"))
