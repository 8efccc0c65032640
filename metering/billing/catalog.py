"""What is for sale at Stripe, made to be what aap.toml says: products, prices and meters, by their keys.

Nothing is deleted, and nothing made twice: a price is found by its lookup key, a meter by its event's name, a product
by its metadata. A price cannot be changed: another amount is another price, which takes over the key; who subscribed
before keeps paying the old one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Final, cast

import msgspec

from core.database import Database
from metering.billing import marks
from metering.billing.catalog_ids import CATALOG_MARK, SoldAt
from metering.billing.meters import TOKENS, USAGE, USAGE_CENTS_PER_UNIT, Meter
from metering.billing.plans import Plan, Plans
from metering.billing.stripe_api import StripeApi
from metering.billing.stripe_objects import PLAN_METADATA, USAGE_METADATA, Json

_USAGE_KEY: Final = "aap_usage_micro_usd_v1"


class CatalogChange(msgspec.Struct, frozen=True, kw_only=True):
    """What is there to do, or was done."""

    act: str
    """create | replace | rename"""
    kind: str
    name: str
    detail: str


def meters_of(plans: Plans) -> tuple[Meter, ...]:
    """Return what is metered."""
    return (USAGE, *TOKENS) if plans.billing.token_meters else (USAGE,)


async def synchronise(database: Database, api: StripeApi, plans: Plans, *, is_dry_run: bool) -> list[CatalogChange]:
    """Make what is missing at Stripe, or with *is_dry_run* only say what that would be. Errors: StripeFailed.

    Also takes over the ids of what is there: a gateway with another database knows them after it.
    """
    sync = _Sync(api, is_dry_run=is_dry_run)
    await sync.load()
    meters = {meter.event_name: await sync.meter(meter) for meter in meters_of(plans)}
    usage_price = await sync.usage_price(meters[USAGE.event_name])
    prices = {plan.name: await sync.plan_price(plan) for plan in plans if plan.is_sold}
    if not is_dry_run:
        sold = SoldAt(plans=prices, usage_price=usage_price, meters=meters)
        async with database.transaction() as session:
            await marks.set_mark(session, CATALOG_MARK, msgspec.to_builtins(sold))
    return sync.changes


class _Sync:
    """One synchronisation: what Stripe has, and what was done about it."""

    def __init__(self, api: StripeApi, *, is_dry_run: bool) -> None:
        self._api = api
        self._is_dry_run = is_dry_run
        self._products: Sequence[Json] = ()
        self._prices: Sequence[Json] = ()
        self._meters: Sequence[Json] = ()
        self.changes: list[CatalogChange] = []

    async def load(self) -> None:
        """Read what is there."""
        self._products = await self._api.list_catalog("products")
        self._prices = await self._api.list_catalog("prices")
        self._meters = await self._api.list_catalog("meters")

    async def meter(self, meter: Meter) -> str:
        """Return the meter's id; make it where there is none."""
        for one in self._meters:
            if one["event_name"] == meter.event_name and one["status"] == "active":
                return one["id"]
        params = {
            "display_name": meter.title,
            "event_name": meter.event_name,
            "default_aggregation": {"formula": "sum"},
        }
        return await self._create("meters", meter.event_name, meter.title, params)

    async def usage_price(self, meter_id: str) -> str:
        """Return the id of the price that bills usage."""
        metadata = {USAGE_METADATA: USAGE.event_name}
        product = await self._product(metadata, USAGE.title)
        params: dict[str, Any] = {
            "product": product,
            "currency": "usd",
            "unit_amount_decimal": USAGE_CENTS_PER_UNIT,
            "recurring": {"interval": "month", "usage_type": "metered", "meter": meter_id},
            "lookup_key": _USAGE_KEY,
            "metadata": metadata,
        }
        return await self._price(_USAGE_KEY, f"{USAGE_CENTS_PER_UNIT} cents per micro-USD", params)

    async def plan_price(self, plan: Plan) -> str:
        """Return the id of a plan's price."""
        metadata = {PLAN_METADATA: plan.name}
        key = f"aap_plan_{plan.name}_month"
        params: dict[str, Any] = {
            "product": await self._product(metadata, plan.title),
            "currency": "usd",
            "unit_amount": plan.price_cents_per_month,
            "recurring": {"interval": "month"},
            "lookup_key": key,
            "metadata": metadata,
        }
        return await self._price(key, f"{plan.price_cents_per_month / 100:.2f} USD a month", params)

    async def _product(self, metadata: dict[str, str], title: str) -> str:
        for one in self._products:
            if metadata.items() <= dict(one.get("metadata") or {}).items():
                if one["name"] != title:
                    self._note("rename", "product", one["name"], title)
                    if not self._is_dry_run:
                        await self._api.rename_product(one["id"], title)
                return one["id"]
        return await self._create("products", title, title, {"name": title, "metadata": metadata})

    async def _price(self, key: str, detail: str, params: dict[str, Any]) -> str:
        existing = next((one for one in self._prices if one.get("lookup_key") == key), None)
        if existing is None:
            return await self._create("prices", key, detail, params)
        if _is_same(existing, params):
            return existing["id"]
        return await self._create("prices", key, detail, {**params, "transfer_lookup_key": True}, act="replace")

    async def _create(self, kind: str, name: str, detail: str, params: dict[str, Any], act: str = "create") -> str:
        self._note(act, kind.removesuffix("s"), name, detail)
        if self._is_dry_run:
            return ""
        # The same wish within a day is the same object, also where the answer was lost.
        wish = hashlib.sha256(msgspec.json.encode(params, order="deterministic")).hexdigest()
        made = await self._api.add_to_catalog(kind, params, idempotency_key=f"sync:{kind}:{wish[:32]}")
        return made["id"]

    def _note(self, act: str, kind: str, name: str, detail: str) -> None:
        self.changes.append(CatalogChange(act=act, kind=kind, name=name, detail=detail))


def _is_same(price: Json, params: dict[str, Any]) -> bool:
    recurring, wanted = cast("Json", price.get("recurring") or {}), cast("Json", params["recurring"])
    amounts = str(price.get("unit_amount_decimal")) == str(params.get("unit_amount_decimal", params.get("unit_amount")))
    meters = recurring.get("meter") == wanted.get("meter")
    return amounts and meters and recurring.get("interval") == wanted["interval"]
