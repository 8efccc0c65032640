"""Gateways for faults: short deadlines, and a fresh deployment for each test, so that no breaker outlives its test."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator

import pytest

from core.database import Database
from tests.harness.gateway import Gateway, config_for
from tests.harness.minute import Minute, begin_a_minute
from tests.harness.provider import FakeProvider
from tests.harness.stores import TestStores

PATH = "/v1/chat/completions"
_MODELS = tuple(f"m{number}" for number in range(200))
_unused = itertools.cycle(_MODELS)


def impatient(config: str) -> str:
    """The same configuration with deadlines that a test can wait for."""
    return config.replace("first_byte_seconds = 5", "first_byte_seconds = 1").replace(
        "idle_seconds = 3", "idle_seconds = 1"
    )


@pytest.fixture(scope="session")
async def gateway(
    stores: TestStores, shared_provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    directory = tmp_path_factory.mktemp("faults")
    config = impatient(config_for(shared_provider.base_url, models=_MODELS))
    async with Gateway(stores, directory, config) as made:
        yield made


@pytest.fixture
def model() -> str:
    """A model whose deployment no other test has used."""
    return next(_unused)


@pytest.fixture(scope="session", autouse=True)
async def a_minute(
    request: pytest.FixtureRequest, stores: TestStores, database: Database, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Minute | None]:
    """The minute of test_slow_clients: it begins with the first fault test, when that module runs here."""
    if any(item.path.name == "test_slow_clients.py" for item in request.session.items):
        async with begin_a_minute(stores, database, tmp_path_factory.mktemp("minute")) as minute:
            yield minute
    else:
        yield None
