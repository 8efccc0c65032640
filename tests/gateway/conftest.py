"""A gateway and a provider that a module's tests share."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import FakeProvider, answer, chat_answer
from tests.harness.stores import TestStores


@pytest.fixture(scope="session")
async def shared_provider() -> AsyncIterator[FakeProvider]:
    made = await FakeProvider().start()
    yield made
    await made.close()


@pytest.fixture
def provider(shared_provider: FakeProvider) -> FakeProvider:
    """The provider, with nothing queued and nothing received."""
    shared_provider.scripts.clear()
    shared_provider.received.clear()
    shared_provider.exchanges.clear()
    shared_provider.default = answer(chat_answer())
    return shared_provider


@pytest.fixture(scope="session")
async def gateway(stores: TestStores, shared_provider: FakeProvider) -> AsyncIterator[Gateway]:
    directory = Path(tempfile.mkdtemp(prefix="aap-"))
    config = config_for(shared_provider.base_url, models=("fake", "org/fake", "other"))
    async with Gateway(stores, directory, config, AAP_SSE_KEEPALIVE_SECONDS="0.5") as made:
        yield made
