"""What hostile filters, odd answers, races and missing keys must not do."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from core.plain_sql import fetch
from tests.harness.eventually import eventually, moment
from tests.harness.stores import TestStores
from tests.harness.webhook_place import SEALER, WorkerProcess, new_endpoint, publish_many, worker
from tests.harness.webhook_sink import Sink, status
from tests.webhooks.conftest import Own
from tests.webhooks.office import ENDPOINTS, office_at
from tests.webhooks.office import webhook_place as gateway_place
from webhooks.endpoints import disable_endpoint, enable_endpoint
from webhooks.errors import FilterInvalid
from webhooks.fan_out import FanOut
from webhooks.filters import check_filter
from webhooks.resend import recover
from webhooks.schedule import retry_after_seconds


async def sql(own: Own, statement: str, *arguments: object) -> list[Any]:
    async with own.database.transaction() as session:
        return await fetch(session, statement, *arguments)


async def test_enabled_again_while_its_worker_lives(own: Own, receiver: Sink) -> None:
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url) as made:
        (first,) = await publish_many(own.database, [own.organization_id])
        await eventually(lambda: first in receiver.counts)
        async with own.database.transaction() as session:
            await disable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
        await eventually(lambda: not made._workload.lanes)
        async with own.database.transaction() as session:
            await enable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
        (second,) = await publish_many(own.database, [own.organization_id])
        await eventually(lambda: second in receiver.counts, 6)


async def test_a_worker_without_the_key_holds_no_endpoint_that_another_could_serve(
    own: Own, receiver: Sink, workdir: Path
) -> None:
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    blind = WorkerProcess(own.stores, workdir)
    blind._environ["AAP_SEALING_KEYS"] = f"other:{bytes(32).hex()}"
    await blind.start()
    (event_id,) = await publish_many(own.database, [own.organization_id])
    await eventually(lambda: view.id in blind.log, 20)
    try:
        async with worker(own.url):
            await eventually(lambda: event_id in receiver.counts, 15)
    finally:
        await blind.stop()


async def test_a_secret_that_is_mended_is_used(own: Own, receiver: Sink, workdir: Path) -> None:
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    await sql(own, "UPDATE webhook_secrets SET sealed = '\\x0104' || sealed")
    process = WorkerProcess(own.stores, workdir)
    await process.start()
    (event_id,) = await publish_many(own.database, [own.organization_id])
    await eventually(lambda: view.id in process.log, 20)
    await sql(own, "UPDATE webhook_secrets SET sealed = substr(sealed, 3)")
    async with own.database.transaction() as session:
        await enable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
    try:
        await eventually(lambda: event_id in receiver.counts, 10)
    finally:
        await process.stop()


@pytest.mark.parametrize("expression", ["ceil(to_number('1e999'))", f"avg([`1{'0' * 900}`])"])
async def test_a_filter_that_overflows_stops_nobody(own: Own, receiver: Sink, expression: str) -> None:
    await new_endpoint(own.database, receiver.url("/a"), own.organization_id, filter=expression)
    other = await own.new_organization()
    await new_endpoint(own.database, receiver.url("/b"), other)
    async with worker(own.url):
        _, theirs = await publish_many(own.database, [own.organization_id, other])
        await eventually(lambda: theirs in receiver.counts, 6)


@pytest.mark.parametrize("step", ["[@,@][]", "[@,@]", "[*][]", "{a: @, b: @}", "map(&@, @)", "to_string(to_array(@))"])
def test_what_doubles_at_each_step_is_no_filter(step: str) -> None:
    """Guarantee: the cost of a filter is bounded by its length: one of 1,000 characters had room for 125 doublings."""
    with pytest.raises(FilterInvalid):
        check_filter(f"name | {step}")


async def test_recovering_brings_no_news_of_the_endpoint_itself(own: Own, receiver: Sink) -> None:
    since = datetime.now(UTC) - timedelta(minutes=1)
    view, _ = await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with own.database.transaction() as session:
        await disable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
    await publish_many(own.database, [own.organization_id])
    await FanOut(own.database).once()
    async with own.database.transaction() as session:
        await enable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
    async with own.database.transaction() as session:
        count = await recover(session, view.id, since, organization_id=own.organization_id, is_dry_run=True)
    assert count == 1  # key.created; is 2, with webhook.endpoint.disabled about itself


async def test_what_was_disabled_and_enabled_before_the_fan_out(own: Own) -> None:
    view, _ = await new_endpoint(own.database, "http://127.0.0.1:9/", own.organization_id)
    async with own.database.transaction() as session:
        await disable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
    async with own.database.transaction() as session:
        await enable_endpoint(session, view.id, SEALER, organization_id=own.organization_id)
    await FanOut(own.database).once()
    assert await sql(own, "SELECT event_type FROM webhook_deliveries") == []


@pytest.mark.parametrize(
    "value", [b"Mon, 01 Jan 2027 00:00:00 +99999999999999999999", b"1 Jan 99999999999999999999 0:0:0 GMT"]
)
def test_retry_after_of_a_hostile_receiver(value: bytes) -> None:
    assert retry_after_seconds(value, datetime(2026, 1, 1, tzinfo=UTC)) is None


async def test_retry_after_over_the_wire(own: Own, receiver: Sink) -> None:
    more = b"retry-after: Mon, 01 Jan 2027 00:00:00 +99999999999999999999\r\n"
    receiver.answers["/hook"] = lambda _: status(500, more=more)
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url):
        await publish_many(own.database, [own.organization_id])
        (row,) = await eventually(lambda: sql(own, "SELECT status, problem FROM webhook_attempts"))
    assert (row.status, row.problem) == (500, "answered 500")


async def test_nul_is_the_callers_fault(stores: TestStores, template: str, tmp_path: Path) -> None:
    async with gateway_place(stores, template, tmp_path) as place, office_at(place) as office:
        url = "http://127.0.0.1:9/"
        made = await office.endpoint(url)
        path = f"{ENDPOINTS}/{made['id']}"
        found = [
            (await office.call("POST", ENDPOINTS, {"url": url, "description": "a\0"})).status_code,
            (await office.call("POST", ENDPOINTS, {"url": url, "filter": "'\0'"})).status_code,
            (
                await office.call("POST", f"{path}/replay", {"since": int(time.time()), "event_types": ["\0"]})
            ).status_code,
            (await office.call("GET", f"{ENDPOINTS}/a%00b")).status_code,
            (await office.call("GET", "/v1/webhook_deliveries/a%00b")).status_code,
        ]
        assert found == [400, 400, 400, 400, 400]


@pytest.mark.parametrize("expression", ["nonsense(name)", "start_with(name, 'a')", "length(name, name)"])
def test_a_function_that_is_none_is_refused(expression: str) -> None:
    with pytest.raises(FilterInvalid):
        check_filter(expression)


async def test_a_mistyped_type_is_refused_by_replay(stores: TestStores, template: str, tmp_path: Path) -> None:
    async with gateway_place(stores, template, tmp_path) as place, office_at(place) as office:
        made = await office.endpoint("http://127.0.0.1:9/")
        body = {"since": int(time.time()), "event_types": ["key.made_up"]}
        refused = await office.refused("POST", f"{ENDPOINTS}/{made['id']}/replay", body)
        assert refused == (400, "event_type_unknown", "event_types")


async def test_no_connection_is_left_behind(own: Own, receiver: Sink) -> None:
    more = b"retry-after: Mon, 01 Jan 2027 00:00:00 +99999999999999999999\r\n"
    receiver.answers["/hook"] = lambda _: status(200, more=more)
    await new_endpoint(own.database, receiver.url(), own.organization_id)
    async with worker(own.url):
        for count in range(1, 5):
            await publish_many(own.database, [own.organization_id])
            await eventually(lambda count=count: len(receiver.arrivals["/hook"]) >= count)
        assert receiver.open_connections <= 2


class _Held:
    """A writer whose answers about which endpoints are its worker's come late."""

    def __init__(self, real: Any) -> None:
        self._real, self.asked, self.may_answer = real, asyncio.Event(), asyncio.Event()

    async def fetch(self, statement: str, *arguments: object) -> list[Any]:
        rows = await self._real.fetch(statement, *arguments)
        if "SELECT id, updated_at FROM webhook_endpoints" in statement:
            self.asked.set()
            await self.may_answer.wait()
        return rows

    async def close(self) -> None:
        await self._real.close()


async def test_an_endpoint_that_is_taken_while_a_beat_looks_stays_served(own: Own, receiver: Sink) -> None:
    await new_endpoint(own.database, receiver.url("/first"), own.organization_id)
    async with worker(own.url) as made:
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: receiver.counts)
        held = _Held(made._workload._stores.beats)
        made._workload._stores = msgspec.structs.replace(made._workload._stores, beats=held)
        await held.asked.wait()
        _view, _ = await new_endpoint(own.database, receiver.url("/second"), own.organization_id)
        await publish_many(own.database, [own.organization_id])
        await eventually(lambda: receiver.arrivals["/second"])
        held.may_answer.set()
        await moment(1.5)
        (later,) = await publish_many(own.database, [own.organization_id])
        await eventually(lambda: receiver.counts[later] == 2, 6)
