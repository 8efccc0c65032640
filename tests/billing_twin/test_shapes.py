"""Shapes: every field of Stripe's examples, none of their values; the older shape; what is vendored and what is imported."""

from __future__ import annotations

import ast
import hashlib
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

import metering.billing.twin
from metering.billing.twin import parameters
from metering.billing.twin.options import TwinOptions
from metering.billing.twin.resources.catalogue import ROUTES
from metering.billing.twin.shapes import EXAMPLES, EXAMPLES_SHA256, blank
from tests.harness.stripe_schema import PARAMETERS, known_parameters
from tests.harness.stripe_twin import pro_subscriber, twin_place

TWIN = Path(metering.billing.twin.__file__).parent


def test_the_vendored_examples_are_unchanged_and_licensed() -> None:
    data = files("metering.billing.twin").joinpath("examples.json").read_bytes()
    assert hashlib.sha256(data).hexdigest() == EXAMPLES_SHA256
    assert "MIT" in files("metering.billing.twin").joinpath("examples.LICENSE").read_text()


@pytest.mark.parametrize("kind", sorted(EXAMPLES))
def test_no_value_of_an_example_leaks(kind: str) -> None:
    """Guarantee: what the twin does not know is null or empty, never a number or a text out of an example."""
    made = blank(kind)
    assert made.keys() >= EXAMPLES[kind].keys() - {"livemode"}
    for leaf in leaves({name: value for name, value in made.items() if name != "object"}):
        assert leaf in RESTING, leaf


RESTING = {
    *(None, True, False, 0, 1, 50, "none", "off", "self", "service", "per_unit", "unspecified", "automatic", "card"),
    *("create_invoice", "unpaid", "open", "hosted_page", "enabled", "ready", "off_session"),
}


def leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, list):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree]


def test_parameters_are_those_of_the_stripe_package() -> None:
    """`python -m tests.harness.stripe_schema` writes the file anew."""
    assert json.loads(PARAMETERS.read_text()) == known_parameters(ROUTES)
    assert parameters.KNOWN.keys() == {f"{route.method} {route.path}" for route in ROUTES}


def test_the_twin_imports_nothing_of_ours_but_the_clock() -> None:
    for path in TWIN.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                root = str(name).split(".")[0]
                assert root not in {"stripe", "keys", "inference", "gateway", "httpx"}, path
                assert root != "core" or name == "core.clock", path
                assert root != "metering" or str(name).startswith("metering.billing.twin"), path


async def test_the_older_shape_is_there_for_older_code() -> None:
    async with twin_place(TwinOptions(older_shapes=True)) as place:
        shop = await pro_subscriber(place)
        await shop.advance(days=32)
        answers = {entry.route: entry.answer for entry in place.twin.journal.entries}
        subscription = answers["/v1/subscriptions"]
        assert subscription["current_period_end"] > subscription["current_period_start"]
        assert all("current_period_end" not in item for item in subscription["items"]["data"])
        await shop.invoices()
        invoice = place.twin.journal.entries[-1].answer["data"][0]
        assert invoice["subscription"] == subscription["id"]
        assert "parent" not in invoice
        line = invoice["lines"]["data"][0]
        assert (line["price"]["id"], line["price"]["unit_amount"]) == (shop.plan, 9_900)
        assert (line["type"], line["proration"]) == ("subscription", False)
        event = place.events("customer.subscription.created")[0]["data"]["object"]
        assert "current_period_end" in event


async def test_the_current_shape_has_dates_on_items_and_parents(place: Any) -> None:
    shop = await pro_subscriber(place)
    (invoice,) = await shop.invoices()
    subscription = await shop.reread()
    assert "current_period_end" not in subscription
    assert subscription["items"].data[0].current_period_start == place.now
    assert invoice.parent.subscription_details.subscription == shop.subscription
    assert invoice.lines.data[0].pricing.price_details.price == shop.plan


async def test_the_same_seed_and_calls_make_the_same_world() -> None:
    worlds: list[str] = []
    for _ in range(2):
        async with twin_place(TwinOptions(seed=3)) as place:
            shop = await pro_subscriber(place)
            await shop.advance(days=40)
            answers = [entry.answer for entry in place.twin.journal.entries]
            worlds.append(json.dumps(answers).replace(place.server.url, ""))
    assert worlds[0] == worlds[1]
