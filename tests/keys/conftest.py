"""Quotas on the worker's Redis, with deadlines that a busy machine does not break."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest

from core.clock import SystemClock
from core.redis import Scripts, scripts_for
from keys.limits import QUOTA_SCRIPTS
from keys.local_quota import LocalQuota
from keys.quota import Quota
from tests.harness.stores import TestStores

IS_FULL = os.environ.get("AAP_TEST_SCALE") == "full"


@pytest.fixture(scope="session")
async def scripts(stores: TestStores) -> AsyncIterator[Scripts]:
    made = scripts_for(stores.redis_url, QUOTA_SCRIPTS, deadline_seconds=30)
    await made.start()
    yield made
    await made.close()


@pytest.fixture(scope="session")
def quota(scripts: Scripts) -> Quota:
    return Quota(scripts, LocalQuota(SystemClock(), lambda: 1))
