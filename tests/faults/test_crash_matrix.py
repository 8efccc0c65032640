"""Whoever dies at whichever point of a call's path: every call is in the ledger once, and the books agree.

Default: a run for each victim of a sample; with AAP_TEST_SCALE=full 220 runs, each named point several times.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from core.money import NanoUsd
from metering.budgets import set_budget
from metering.prices import add_price
from metering.rating import PriceTerms, Rates, Step
from tests.harness.crashes import Matrix, Provider, calls_of, problems
from tests.harness.gateway import Gateway, config_for
from tests.harness.private_stores import private_postgres, private_redis
from tests.harness.provider import FakeProvider
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

_IS_FULL = os.environ.get("AAP_TEST_SCALE") == "full"
# 44 victims in turn: a stride that shares no factor with them meets different ones.
_SEEDS = list(range(220)) if _IS_FULL else [number * 13 % 44 for number in range(11)]
_RATES = Rates(input_tokens=150_000_000, output_tokens=600_000_000)


@pytest.fixture(scope="module")
async def matrix(stores: TestStores) -> AsyncIterator[tuple[Matrix, Tenant, Path]]:
    directory = Path(tempfile.mkdtemp(prefix="aap-"))
    server = await FakeProvider().start()
    async with (
        private_redis(directory) as redis,
        private_postgres(directory, redis.url, stores.pepper) as (postgres, own),
    ):
        made = Matrix(own, postgres, redis, Provider(server))
        tenant = await new_tenant(made.database, own.pepper)
        async with made.database.transaction() as session:
            for run in range(len(_SEEDS) + 1):
                for model in calls_of(run):
                    await add_price(session, model, PriceTerms(tiers={"default": (Step(rates=_RATES),)}))
            await set_budget(
                session,
                ("organization", tenant.organization_id),
                "total",
                limit=NanoUsd(10**15),
                is_hard=True,
                organization_id=tenant.organization_id,
            )
        yield made, tenant, directory
        await made.close()
    await server.close()


@pytest.mark.parametrize("run", range(len(_SEEDS)), ids=[f"seed{seed}" for seed in _SEEDS])
async def test_every_call_is_entered_once_and_the_books_agree(
    matrix: tuple[Matrix, Tenant, Path], run: int, tmp_path: Path
) -> None:
    """Guarantee: exact where the provider reported and its answer was read, else within one checkpoint's window."""
    place, tenant, _ = matrix
    models = calls_of(run)
    config = config_for(place.provider.server.base_url, models=tuple(models))
    victim, died_at = await place.run(_SEEDS[run], tenant, models, Gateway(place.stores, tmp_path, config))
    entries = await place.entries(models)
    wrong = [problem for call in place.called(models, died_at) for problem in problems(call, entries[call.model])]
    assert wrong == [], victim
    verification = await place.verified()
    assert verification.drifts == [], victim
    assert verification.intents == 0


async def test_a_killed_gateway_loses_at_most_what_came_since_the_last_checkpoint(
    matrix: tuple[Matrix, Tenant, Path], tmp_path: Path
) -> None:
    place, tenant, _ = matrix
    models = calls_of(len(_SEEDS))
    gateway = Gateway(place.stores, tmp_path, config_for(place.provider.server.base_url, models=tuple(models)))
    died_at = await place.kill_late(tenant, models, gateway)
    entries = await place.entries(models)
    assert [p for call in place.called(models, died_at) for p in problems(call, entries[call.model])] == []
    # Not for want of something to lose: each had run for longer than two windows.
    for model in models:
        [entry] = entries[model]
        assert entry["outcome"] == "gateway_lost"
        assert entry["output_tokens"] > 0.4 * place.provider.books[model][0].output
    assert (await place.verified()).drifts == []
