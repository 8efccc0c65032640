"""`/v1/organization/ledger_entries` and its export: every entry once, exact, and nobody else's."""

from __future__ import annotations

import asyncio
import csv
import io
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import asyncpg
import msgspec
import pytest

from core.database import Database
from core.money import parse_usd
from keys.lifecycle import NewKey
from keys.scopes import ADMIN_SCOPES
from metering.entry_export import OPERATORS, ROWS_PER_READ, TENANTS, Format, export
from metering.entry_pages import EntryFilter
from tests.harness.eventually import eventually, moment
from tests.harness.gateway import Gateway
from tests.harness.memory import MEGABYTE, forget_peak, resident_bytes_peak
from tests.harness.raw import RawAnswer, RawConnection, call
from tests.harness.statements import captured
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant
from tests.harness.usage_rows import add_entries, add_entry, make_month, request_id

NOON = datetime(2026, 2, 28, 12, tzinfo=UTC)
MARCH = datetime(2026, 3, 1, tzinfo=UTC)
LIST = "/v1/organization/ledger_entries"
EXPORT = f"{LIST}/export"
STRAY = request_id("org_0123456789", MARCH)
LARGE = 60_000
EXPORT_MEMORY_MAX = 16 * MEGABYTE
ALWAYS = {"start_time": 0, "end_time": 9_999_999_999}


@pytest.fixture
async def admin(database: Database, stores: TestStores) -> Tenant:
    """An organization and the key to its books; two months of the ledger are there."""
    async with database.transaction() as session:
        await make_month(session, NOON)
        await make_month(session, MARCH)
    return await new_tenant(database, stores.pepper, NewKey(name="admin", scopes=ADMIN_SCOPES))


async def enter(database: Database, admin: Tenant, at: datetime, number: int = 0, **columns: object) -> str:
    async with database.transaction() as session:
        return await add_entry(session, admin.organization_id, at, number, **columns)


async def ask(gateway: Gateway, key: str, path: str, **query: object) -> RawAnswer:
    return await call(gateway.port, request(key, path, **query))


def request(key: str, path: str, **query: object) -> bytes:
    text = "&".join(f"{name}={value}" for name, value in query.items())
    return f"GET {path}?{text} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n\r\n".encode()


async def listed(gateway: Gateway, admin: Tenant, **query: object) -> list[dict[str, Any]]:
    got = await ask(gateway, admin.key, LIST, **query)
    assert got.status == 200, got.body
    return got.json()["data"]  # type: ignore[return-value]


def lines_of(got: RawAnswer, form: Format) -> list[dict[str, Any]]:
    assert got.status == 200, got.body
    if form == "jsonl":
        return [msgspec.json.decode(line) for line in got.body.splitlines()]
    return list(csv.DictReader(io.StringIO(got.body.decode(), newline="")))


class TestList:
    async def test_an_entry_tells_all_that_concerns_its_organization(
        self, gateway: Gateway, database: Database, admin: Tenant
    ) -> None:
        """Guarantee: and not what the operator pays for it, to whom, and what he notes."""
        call_id = await enter(
            database, admin, NOON, cost_nano_usd=2_500, charge_nano_usd=12_000_000_001, reported_cost_nano_usd=0,
            cached_input_tokens=7, price_id="price_1", charge_price_id="price_2", first_byte_ms=3, note="a note",
        )  # fmt: skip
        [entry] = await listed(gateway, admin)
        booked_at = entry.pop("booked_at")
        assert abs(datetime.fromisoformat(booked_at) - datetime.now(UTC)) < timedelta(minutes=1)
        assert entry == {
            "id": f"{call_id}_usage_0", "object": "organization.ledger_entry", "request_id": call_id, "kind": "usage",
            "seq": 0, "organization_id": admin.organization_id, "project_id": "proj_1", "api_key_id": "key_1",
            "secret_id": "ksec_1", "model": "fake", "operation": "chat",
            "service_tier": "default", "input_tokens": 0, "cached_input_tokens": 7, "cache_write_tokens": 0,
            "cache_write_1h_tokens": 0, "input_audio_tokens": 0, "input_image_tokens": 0, "output_tokens": 0,
            "reasoning_tokens": 0, "output_audio_tokens": 0, "output_image_tokens": 0, "images": 0, "audio_seconds": 0,
            "charge_usd": "12.000000001", "charge_price_id": "price_2", "is_unpriced": False, "quality": "exact", "requests": 1, "status": 200,
            "outcome": "done", "duration_ms": 10, "first_byte_ms": 3, "corrects_kind": None, "corrects_seq": None,
            "occurred_at": "2026-02-28T12:00:00Z",
        }  # fmt: skip

    @pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
    async def test_pages_hold_every_entry_once_newest_first(
        self, gateway: Gateway, database: Database, admin: Tenant, limit: int
    ) -> None:
        """Guarantee: also where a page ends between a call and its correction, or between two months."""
        for at, number in ((NOON, 0), (NOON, 1), (MARCH - timedelta(milliseconds=1), 0), (MARCH, 0)):
            await enter(database, admin, at, number)
            await enter(database, admin, at, number, kind="adjustment", seq=1, corrects_kind="usage", corrects_seq=0)
        found, after = [], {}
        while True:
            page = (await ask(gateway, admin.key, LIST, limit=limit, **after)).json()
            entries: Any = page["data"]
            assert (page["object"], page["first_id"], page["last_id"]) == ("list", entries[0]["id"], entries[-1]["id"])
            found += [(entry["request_id"], entry["kind"], entry["seq"]) for entry in entries]
            after = {"after": page["last_id"]}
            if not page["has_more"]:
                break
            assert len(entries) == limit
        assert len(found) == 8
        assert all(newer > older for newer, older in pairwise(found))

    async def test_an_empty_page(self, gateway: Gateway, admin: Tenant) -> None:
        got = (await ask(gateway, admin.key, LIST)).json()
        assert got == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}

    async def test_filters(self, gateway: Gateway, database: Database, admin: Tenant) -> None:
        seconds = int(NOON.timestamp())
        first = await enter(database, admin, NOON)
        second = await enter(database, admin, NOON + timedelta(seconds=1), model="other", project_id="proj_2")
        third = await enter(database, admin, NOON + timedelta(seconds=2), model="third", key_id="key_3")
        for query, expected in (
            ({"start_time": seconds + 1}, [third, second]),
            ({"end_time": seconds + 1}, [first]),
            ({"start_time": seconds, "end_time": seconds + 2}, [second, first]),
            ({"start_time": seconds + 3}, []),
            ({"models": "fake", "models[]": "other"}, [second, first]),
            ({"project_ids": "proj_2"}, [second]),
            ({"api_key_ids[]": "key_3"}, [third]),
            ({"request_id": second}, [second]),
            ({"request_id": second, "models": "fake"}, []),
            ({"request_id": "'%20OR%20true--"}, []),
        ):
            assert [entry["request_id"] for entry in await listed(gateway, admin, **query)] == expected, query

    @pytest.mark.parametrize(
        ("query", "param"),
        [
            ({"limit": 0}, "limit"),
            ({"limit": 101}, "limit"),
            ({"after": "x"}, "after"),
            ({"after": f"{request_id('org_0123456789', NOON)}_usage_99999"}, "after"),
            ({"after": f"{request_id('org_0123456789', NOON)}_usage_0%0a"}, "after"),
            ({"start_time": 5, "end_time": 5}, "end_time"),
            ({"organization_id": "org_1"}, "organization_id"),
            ({"before": "x"}, "before"),
        ],
    )
    async def test_a_query_that_is_wrong_is_refused_by_name(
        self, gateway: Gateway, admin: Tenant, query: dict[str, object], param: str
    ) -> None:
        got = await ask(gateway, admin.key, LIST, **query)
        assert (got.status, got.error()["param"]) == (400, param)


class TestExport:
    @pytest.mark.parametrize("form", ["csv", "jsonl"])
    async def test_a_file_holds_every_entry_once_oldest_first_and_exact(
        self, gateway: Gateway, database: Database, admin: Tenant, form: Format
    ) -> None:
        count = 2 * ROWS_PER_READ + 5
        await enter(database, admin, NOON - timedelta(days=1), charge_nano_usd=-1)
        async with database.transaction() as session:
            await add_entries(session, admin.organization_id, NOON, count)
        await enter(database, admin, MARCH, charge_nano_usd=2**62)
        lines = lines_of(await ask(gateway, admin.key, EXPORT, format=form, **ALWAYS), form)
        ids = [line["request_id"] for line in lines]
        assert (len(lines), ids) == (count + 2, sorted(set(ids)))
        charges = [parse_usd(line["charge_usd"]) for line in lines]
        assert charges == [-1, *range(1, count + 1), 2**62]
        assert lines[0]["charge_usd"] == "-0.000000001"

    async def test_both_forms_and_the_list_tell_the_same(
        self, gateway: Gateway, database: Database, admin: Tenant
    ) -> None:
        await enter(
            database, admin, NOON + timedelta(microseconds=123_456), model='a "quoted", name\nof two lines — ü',
            is_unpriced=True, input_tokens=5, reported_cost_nano_usd=1,
        )  # fmt: skip
        [from_list] = await listed(gateway, admin)
        [from_json] = lines_of(await ask(gateway, admin.key, EXPORT, format="jsonl", **ALWAYS), "jsonl")
        [from_csv] = lines_of(await ask(gateway, admin.key, EXPORT, **ALWAYS), "csv")
        assert from_json == from_list
        del from_list["object"]
        assert tuple(from_csv) == tuple(from_list) == TENANTS.columns
        texts = {True: "true", False: "false", None: ""}
        assert from_csv == {
            name: texts[value] if value is None or isinstance(value, bool) else str(value)
            for name, value in from_list.items()
        }

    @pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
    async def test_a_name_that_a_spreadsheet_would_run_is_text(
        self, gateway: Gateway, database: Database, admin: Tenant, start: str
    ) -> None:
        """Guarantee: names from outside begin no formula; amounts keep their minus."""
        evil = f'{start}HYPERLINK("http://evil.example/")'
        outside = {"model": evil, "service_tier": evil}
        await enter(database, admin, NOON, **outside, charge_nano_usd=-1_000_000_000)
        [line] = lines_of(await ask(gateway, admin.key, EXPORT, **ALWAYS), "csv")
        assert {name: line[name] for name in outside} == dict.fromkeys(outside, f"'{evil}")
        assert line["charge_usd"] == "-1"
        [line] = lines_of(await ask(gateway, admin.key, EXPORT, format="jsonl", **ALWAYS), "jsonl")
        assert {name: line[name] for name in outside} == outside

    async def test_the_operators_file_holds_what_customers_do_not_see(self, database: Database, admin: Tenant) -> None:
        await enter(
            database, admin, NOON, deployment="=p0/fake", price_id="price_1", cost_nano_usd=2, note="-x",
            charge_nano_usd=-1,
        )  # fmt: skip
        pieces = export(database, EntryFilter(), organization_id=admin.organization_id, form="csv", view=OPERATORS)
        [line] = csv.DictReader(io.StringIO(b"".join([piece async for piece in pieces]).decode(), newline=""))
        more = {"deployment": "'=p0/fake", "price_id": "price_1", "cost_usd": "0.000000002", "note": "'-x"}
        assert {name: line[name] for name in more} == more
        assert (line["charge_usd"], line["reported_cost_usd"]) == ("-0.000000001", "")
        assert tuple(line) == OPERATORS.columns
        assert set(OPERATORS.columns) - set(TENANTS.columns) == {*more, "reported_cost_usd"}

    async def test_a_file_without_entries(self, gateway: Gateway, admin: Tenant) -> None:
        got = await ask(gateway, admin.key, EXPORT, start_time=0)
        assert got.body.decode() == ",".join(TENANTS.columns) + "\r\n"
        assert got.headers["content-type"] == "text/csv; charset=utf-8"
        assert got.headers["content-disposition"].startswith('attachment; filename="ledger_19700101t000000z_')
        got = await ask(gateway, admin.key, EXPORT, start_time=0, format="jsonl")
        assert (got.status, got.body, got.headers["content-type"]) == (200, b"", "application/jsonl")

    async def test_a_time_holds_its_start_and_not_its_end(
        self, gateway: Gateway, database: Database, admin: Tenant
    ) -> None:
        """Guarantee: two months that meet share no entry and miss none."""
        for at in (NOON, MARCH - timedelta(milliseconds=1), MARCH, MARCH + timedelta(milliseconds=1)):
            await enter(database, admin, at)
        border = int(MARCH.timestamp())
        parts = [
            lines_of(await ask(gateway, admin.key, EXPORT, start_time=start, end_time=end), "csv")
            for start, end in ((0, border), (border, border + 100))
        ]
        assert [len(part) for part in parts] == [2, 2]

    @pytest.mark.parametrize(
        ("query", "param"),
        [({}, "start_time"), ({"start_time": 1, "format": "xlsx"}, "format"), ({"start_time": 1, "limit": 1}, "limit")],
    )
    async def test_a_query_that_is_wrong_is_refused_by_name(
        self, gateway: Gateway, admin: Tenant, query: dict[str, object], param: str
    ) -> None:
        got = await ask(gateway, admin.key, EXPORT, **query)
        assert (got.status, got.error()["param"]) == (400, param)


class TestTenancy:
    @pytest.mark.parametrize("path", [LIST, EXPORT])
    async def test_another_organizations_entries_are_not_there(
        self, gateway: Gateway, database: Database, stores: TestStores, admin: Tenant, path: str
    ) -> None:
        call_id = await enter(database, admin, NOON)
        stranger = await new_tenant(database, stores.pepper, NewKey(name="s", scopes=ADMIN_SCOPES))
        queries = [ALWAYS, {**ALWAYS, "project_ids": "proj_1", "api_key_ids": "key_1"}]
        if path == LIST:
            queries += [{"request_id": call_id}, {"after": f"{request_id('org_0123456789', MARCH)}_usage_0"}]
        for query in queries:
            assert call_id.encode() in (await ask(gateway, admin.key, path, **query)).body
            got = await ask(gateway, stranger.key, path, **query)
            assert got.status == 200
            assert b"req_" not in got.body

    @pytest.mark.parametrize("path", [LIST, EXPORT])
    async def test_a_key_for_calling_models_is_forbidden(self, gateway: Gateway, tenant: Tenant, path: str) -> None:
        got = await ask(gateway, tenant.key, path, start_time=0)
        assert (got.status, got.error()["code"]) == (403, "insufficient_permissions")


@pytest.fixture(scope="module")
async def large(database: Database, stores: TestStores) -> Tenant:
    admin = await new_tenant(database, stores.pepper, NewKey(name="admin", scopes=ADMIN_SCOPES))
    async with database.transaction() as session:
        await make_month(session, NOON)
        await add_entries(session, admin.organization_id, NOON, LARGE)
    return admin


class TestStreaming:
    """A file larger than all buffers between here and there."""

    async def stalled(self, gateway: Gateway, large: Tenant) -> RawConnection:
        """A caller who has read the head of a file, and then nothing for as long as the gateway has work."""
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=2**16)
        connection = RawConnection(reader, writer)
        await connection.send(request(large.key, EXPORT, format="jsonl", **ALWAYS))
        assert (await connection.head())[0] == 200
        return connection

    async def is_quiet(self, stores: TestStores) -> bool:
        """Whether for a while nobody has a transaction open that reads entries."""
        connection = await asyncpg.connect(stores.database_url)
        try:
            for _ in range(20):
                if await connection.fetchval(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                    " AND query LIKE '%ledger_entries%' AND pid <> pg_backend_pid() AND state <> 'idle'"
                ):
                    return False
                await moment(0.01)
        finally:
            await connection.close()
        return True

    async def test_nothing_is_read_ahead_of_who_takes_it(self, database: Database, large: Tenant) -> None:
        """Guarantee: one read, which is one short transaction, for each thousand that is taken."""
        taken = 0
        with captured(database) as reads:
            async for piece in export(database, EntryFilter(), organization_id=large.organization_id, form="jsonl"):
                taken += len(piece.splitlines())
                assert len(reads) == -(-taken // ROWS_PER_READ)
        assert taken == LARGE

    async def test_a_slow_reader_holds_no_transaction_and_gets_it_all_out_of_constant_memory(
        self, gateway: Gateway, stores: TestStores, large: Tenant
    ) -> None:
        process = gateway.processes[0].pid
        before = forget_peak(process)
        connection = await self.stalled(gateway, large)
        await eventually(lambda: self.is_quiet(stores), 20)
        body = await asyncio.wait_for(connection.body({}), 60)
        connection.close()
        assert body.count(b"\n") == LARGE
        assert len(body) > 3 * EXPORT_MEMORY_MAX
        assert resident_bytes_peak(process) - before < EXPORT_MEMORY_MAX

    async def test_one_at_once_and_the_next_when_it_has_ended(self, gateway: Gateway, large: Tenant) -> None:
        """Guarantee: a process that has calls to answer writes one file at a time for an organization."""
        running = await self.stalled(gateway, large)
        refused = await ask(gateway, large.key, EXPORT, start_time=0)
        assert (refused.status, refused.error()["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "5"
        assert (await ask(gateway, large.key, LIST)).status == 200
        whole = await asyncio.wait_for(running.body({}), 60)
        running.close()
        assert whole.count(b"\n") == LARGE
        assert await self.has_room(gateway, large)

    async def has_room(self, gateway: Gateway, large: Tenant) -> bool:
        """Whether one more may run: who has left has given the place back."""
        return (await ask(gateway, large.key, EXPORT, start_time=0, end_time=1)).status == 200

    async def test_who_hangs_up_stops_it(self, gateway: Gateway, stores: TestStores, large: Tenant) -> None:
        """Guarantee: and gives its place back, at whichever moment."""
        broken = gateway.log.count("request.broke")
        for _ in range(3):
            (await self.stalled(gateway, large)).reset()
            await eventually(lambda: self.has_room(gateway, large))
        for _ in range(20):
            connection = await RawConnection.open(gateway.port)
            await connection.send(request(large.key, EXPORT, format="jsonl", **ALWAYS))
            connection.reset()
        await eventually(lambda: self.has_room(gateway, large))
        await eventually(lambda: self.is_quiet(stores), 20)
        assert (await ask(gateway, large.key, LIST)).status == 200
        assert gateway.log.count("request.broke") == broken

    async def test_a_file_that_breaks_off_is_not_taken_for_a_whole_one(
        self, gateway: Gateway, stores: TestStores, large: Tenant, admin: Tenant
    ) -> None:
        """Guarantee: with PostgreSQL stuck, a file ends without its end, and what has not begun is a 503."""
        connection = await self.stalled(gateway, large)
        lock = await asyncpg.connect(stores.database_url)
        async with lock.transaction():
            await lock.execute("LOCK TABLE ledger_entries IN ACCESS EXCLUSIVE MODE")
            rest = asyncio.create_task(connection.body({}))
            refused = await asyncio.gather(ask(gateway, large.key, LIST), ask(gateway, admin.key, EXPORT, start_time=0))
            with pytest.raises(asyncio.IncompleteReadError):
                await asyncio.wait_for(rest, 30)
        await lock.close()
        connection.close()
        assert [(got.status, got.error()["code"]) for got in refused] == [(503, "usage_unavailable")] * 2
        assert (await ask(gateway, large.key, LIST)).status == 200
