"""What is for sale at Stripe, after `aap stripe sync`."""

from __future__ import annotations

import asyncio

import msgspec

from metering.billing import catalog
from metering.billing.plans import Plans
from tests.harness.billing import BillingPlace


async def _plan(place: BillingPlace, plans: Plans, *, is_dry_run: bool = False) -> list[tuple[str, str, str]]:
    changes = await catalog.synchronise(place.database, place.api, plans, is_dry_run=is_dry_run)
    return [(change.act, change.kind, change.name) for change in changes]


def _with(plans: Plans, name: str, **changes: object) -> Plans:
    changed = msgspec.structs.replace(plans.by_name[name], **changes)
    return msgspec.structs.replace(plans, by_name={**plans.by_name, name: changed})


def _count(place: BillingPlace) -> dict[str, int]:
    return {kind: len(place.twin.state.tables[kind]) for kind in ("product", "price", "billing.meter")}


async def test_the_first_time_everything_is_made_and_the_second_time_nothing(place: BillingPlace) -> None:
    # The place has synchronised already.
    assert _count(place) == {"product": 3, "price": 3, "billing.meter": 1}
    assert await _plan(place, place.plans) == []
    assert _count(place) == {"product": 3, "price": 3, "billing.meter": 1}


async def test_a_dry_run_says_what_there_is_to_do_and_does_nothing(place: BillingPlace) -> None:
    dearer = _with(place.plans, "pro", price_cents_per_month=12_900)
    assert await _plan(place, dearer, is_dry_run=True) == [("replace", "price", "aap_plan_pro_month")]
    assert _count(place)["price"] == 3


async def test_another_amount_is_another_price_under_the_same_key(place: BillingPlace) -> None:
    """Guarantee: who subscribed before keeps paying what they agreed to."""
    organization_id = await place.subscriber()
    dearer = _with(place.plans, "pro", price_cents_per_month=12_900)
    assert await _plan(place, dearer) == [("replace", "price", "aap_plan_pro_month")]
    assert await _plan(place, dearer) == []
    place.pass_time(days=32)
    await place.hear()
    totals = await place.rows("SELECT total_cents FROM invoices ORDER BY issued_at DESC LIMIT 1")
    assert totals == [(9_900,)]
    place.plans = dearer
    await place.customers.cancel(organization_id, at_once=True)
    await place.subscriber()
    totals = await place.rows("SELECT max(total_cents) FROM invoices")
    assert totals == [(12_900,)]


async def test_another_title_renames_the_product(place: BillingPlace) -> None:
    assert await _plan(place, _with(place.plans, "pro", title="Professional")) == [("rename", "product", "Pro")]
    names = {one["name"] for one in place.twin.state.tables["product"].values()}
    assert "Professional" in names
    assert "Pro" not in names


async def test_two_at_once_make_one_of_each(place: BillingPlace) -> None:
    more = {**place.plans.by_name, "team": msgspec.structs.replace(place.plans.by_name["pro"], name="team", title="T")}
    plans = msgspec.structs.replace(place.plans, by_name=more)
    await asyncio.gather(_plan(place, plans), _plan(place, plans))
    assert _count(place) == {"product": 4, "price": 4, "billing.meter": 1}


async def test_token_meters_are_made_when_asked_for_and_cost_nothing(place: BillingPlace) -> None:
    billing = msgspec.structs.replace(place.plans.billing, token_meters=True)
    plans = msgspec.structs.replace(place.plans, billing=billing)
    assert await _plan(place, plans) == [
        ("create", "meter", "input_tokens_v1"),
        ("create", "meter", "output_tokens_v1"),
    ]
    place.plans = plans
    organization_id = await place.subscriber()
    await place.use(organization_id, 1_000)
    place.pass_time(hours=2)
    await place.export()
    customer = await place.customer_of(organization_id)
    totals = [place.twin.meter_total(customer, name, 0, 2**33) for name in ("input_tokens_v1", "output_tokens_v1")]
    assert totals == [10, 20]
