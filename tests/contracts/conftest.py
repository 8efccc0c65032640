"""A gateway whose catalog holds every model that the recordings and the clients name."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tests.contracts.recordings import load
from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import FakeProvider
from tests.harness.stores import TestStores


@pytest.fixture(scope="session")
async def gateway(stores: TestStores, shared_provider: FakeProvider) -> AsyncIterator[Gateway]:
    directory = Path(tempfile.mkdtemp(prefix="aap-"))
    bodies = [recording.request_body for recording in load() if recording.content_type == "application/json"]
    models = sorted({str(msgspec.json.decode(body)["model"]) for body in bodies} | {"fake", "org/fake", "whisper-1"})
    async with Gateway(stores, directory, config_for(shared_provider.base_url, models=tuple(models))) as made:
        yield made


@pytest.fixture(scope="session")
async def demo(stores: TestStores) -> AsyncIterator[Gateway]:
    """A gateway with no provider configured."""
    directory = Path(tempfile.mkdtemp(prefix="aap-"))
    async with Gateway(stores, directory, "") as made:
        yield made
