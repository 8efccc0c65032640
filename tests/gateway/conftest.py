"""A gateway and a provider that a module's tests share."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import FakeProvider
from tests.harness.stores import TestStores


@pytest.fixture(scope="session")
async def gateway(stores: TestStores, shared_provider: FakeProvider) -> AsyncIterator[Gateway]:
    directory = Path(tempfile.mkdtemp(prefix="aap-"))
    config = config_for(shared_provider.base_url, models=("fake", "org/fake", "other"))
    async with Gateway(stores, directory, config, AAP_SSE_KEEPALIVE_SECONDS="0.5") as made:
        yield made
