"""A twin with Stripe's own rules and none of its limits, fresh for each test."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from tests.harness.stripe_twin import Place, twin_place


@pytest.fixture
async def place() -> AsyncGenerator[Place]:
    async with twin_place() as made:
        yield made
