"""A twin with Stripe's own rules and none of its limits, fresh for each test."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import pytest

from tests.harness.stripe_twin import Place, twin_place
from tests.harness.stripe_types import check_answers, check_requests


@pytest.fixture
async def place() -> AsyncGenerator[Place]:
    """A twin on a clock that stands; what was asked and answered is checked against Stripe's types afterwards."""
    async with twin_place() as made:
        yield made
        check_requests(made.twin, only_accepted=True)
        check_answers(made.twin)
