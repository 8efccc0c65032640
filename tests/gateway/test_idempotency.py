"""Requests with an Idempotency-Key, over real sockets: one call to the provider, one entry, the same bytes for all."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec
import pytest
from openai import AsyncOpenAI

from core.database import Database
from core.ids import new_id
from gateway.idempotency_claims import prune
from keys.lifecycle import NewKey, create_key
from keys.limits import RateLimits
from metering.prices import add_price
from metering.rating import PriceTerms, Rates, Step
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway, config_for
from tests.harness.idempotent import (
    CHAT,
    USED,
    Books,
    Gate,
    ask,
    connected,
    is_replayed,
    kept_as,
    keyed,
    runs,
    without_comments,
)
from tests.harness.provider import Exchange, FakeProvider, answer, chat_answer, chunk, stream
from tests.harness.raw import RawConnection, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

_PRICED = "idem"
_MODELS = tuple(f"idem{number}" for number in range(50))
_unused = itertools.cycle(_MODELS)
_RATES = Rates(input_tokens=10**9, output_tokens=10**9)
_FORM = (
    '--{0}\r\ncontent-disposition: form-data; name="model"\r\n\r\nidem\r\n'
    '--{0}\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--{0}--\r\n'
)


class Pair(NamedTuple):
    """Two gateways on the same stores, and their books."""

    one: Gateway
    other: Gateway
    books: Books


@pytest.fixture(scope="module")
async def pair(
    stores: TestStores,
    database: Database,
    shared_provider: FakeProvider,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Pair]:
    config = config_for(shared_provider.base_url, models=(_PRICED, *_MODELS))
    books = Books(stores.database_url)
    async with database.transaction() as session:
        await add_price(session, _PRICED, PriceTerms(tiers={"default": (Step(rates=_RATES),)}))
    one, other = [Gateway(stores, tmp_path_factory.mktemp("idempotency"), config) for _ in range(2)]
    async with one, other:
        yield Pair(one, other, books)
    await books.close()


@pytest.fixture
def name() -> str:
    """A fresh Idempotency-Key."""
    return new_id("req")


@pytest.fixture
def model() -> str:
    """A model whose deployment no other test has used."""
    return next(_unused)


@pytest.fixture
async def aborting(database: Database, stores: TestStores) -> Tenant:
    """An organization that wants its provider stopped when the caller is gone."""
    return await new_tenant(database, stores.pepper, policy="abort")


class TestTogether:
    @pytest.mark.parametrize("processes", [1, 2])
    @pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
    async def test_fifty_at_once_are_one_call_and_get_the_same_bytes(
        self, pair: Pair, provider: FakeProvider, database: Database, stores: TestStores, name: str,
        is_stream: bool, processes: int,
    ) -> None:  # fmt: skip
        """Guarantee: the provider is asked once, the ledger has one entry, the quota is charged once."""
        limits = RateLimits(requests_per_day=1_000)
        tenant = await new_tenant(database, stores.pepper, limits={"key": limits})
        gate = Gate()
        provider.scripts.append(gate.stream if is_stream else gate.whole)
        gateways = [pair.one, pair.other][:processes]
        body = chat(_PRICED, stream=is_stream)
        calls = [asyncio.create_task(ask(gateways[n % processes], tenant, name, body)) for n in range(50)]
        await runs(50, *gateways)
        gate.opened.set()
        got = await asyncio.gather(*calls)
        assert {one.status for one in got} == {200}
        assert len({one.body for one in got}) == 1
        assert got[0].body.endswith(b"data: [DONE]\n\n" if is_stream else b"}")
        assert len(provider.received) == 1
        [first] = [one for one in got if not is_replayed(one)]
        entry = await pair.books.entry(tenant)
        assert entry["request_id"] == first.headers["x-request-id"]
        assert (entry["input_tokens"], entry["output_tokens"], entry["quality"]) == (*USED, "exact")
        assert {one.headers.get("original-request") for one in got} == {None, entry["request_id"]}
        unkeyed = await call(pair.one.port, post(CHAT, tenant.key, chat(_PRICED)))
        assert unkeyed.headers["x-ratelimit-remaining-requests"] == "998"

    async def test_who_joins_a_stream_gets_what_has_come_and_then_each_part_as_it_comes(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        gate = Gate("early", "late")
        provider.scripts.append(gate.stream)
        first = await connected(pair.one, tenant, name, chat(_PRICED, stream=True))
        await first.head()
        assert b"early" in await first.chunk()
        joiner = await connected(pair.one, tenant, name, chat(_PRICED, stream=True))
        _, headers = await joiner.head()
        assert headers["idempotent-replayed"] == "true"
        assert b"early" in await joiner.chunk()
        gate.opened.set()
        rests = [await connection.body({}) for connection in (first, joiner)]
        assert rests[0] == rests[1]
        assert b"late" in rests[0]
        for connection in (first, joiner):
            connection.close()

    @pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
    async def test_who_waits_for_another_process_is_kept_alive_if_a_stream_was_asked_for(
        self, pair: Pair, gateway: Gateway, provider: FakeProvider, tenant: Tenant, name: str, is_stream: bool
    ) -> None:
        gate = Gate()
        provider.scripts.append(gate.stream if is_stream else gate.whole)
        body = chat(_PRICED, stream=is_stream)
        first = asyncio.create_task(ask(pair.one, tenant, name, body))
        await gate.begun.wait()
        # This gateway sends a comment each half second.
        waiting = await connected(gateway, tenant, name, body)
        if is_stream:
            status, headers = await waiting.head()
            assert (status, await waiting.chunk()) == (200, b": keep-alive\n\n")
            gate.opened.set()
            rest = await waiting.body(headers)
        else:
            await runs(1, gateway)
            gate.opened.set()
            got = await waiting.answer()
            assert is_replayed(got)
            rest = got.body
        assert without_comments(rest) == (await first).body
        waiting.close()

    async def test_who_waits_in_vain_reads_an_error_event_if_comments_have_come(
        self, pair: Pair, gateway: Gateway, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        """Guarantee: a stream that a comment has begun ends with an error, never as if it were whole."""
        gate = Gate()
        provider.scripts.append(gate.stream)
        first = await connected(pair.one, tenant, name, chat(_PRICED, stream=True))
        await gate.begun.wait()
        waiting = await connected(gateway, tenant, name, chat(_PRICED, stream=True))
        _, headers = await waiting.head()
        # The claim turns out to be another request's: nothing else ends the wait with an error as surely.
        await pair.books.rows(
            "UPDATE idempotent_answers SET request_digest = 'x' WHERE idempotency_key = $1", kept_as(name)
        )
        rest = without_comments(await waiting.body(headers))
        assert b'"code":"idempotency_key_reused"' in rest
        assert b"[DONE]" not in rest
        gate.opened.set()
        await first.answer()
        for connection in (first, waiting):
            connection.close()


class TestReplay:
    @pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
    async def test_an_answer_is_given_again_by_every_process_and_costs_nothing(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str, is_stream: bool
    ) -> None:
        provider.scripts.append(stream("a", "b") if is_stream else answer(chat_answer(), more="openai-model: x-1\r\n"))
        body = chat(_PRICED, stream=is_stream)
        first = await ask(pair.one, tenant, name, body)
        for gateway in (pair.one, pair.other):
            again = await ask(gateway, tenant, name, body)
            assert (again.status, again.body) == (200, first.body)
            assert again.headers["original-request"] == first.headers["x-request-id"] != again.headers["x-request-id"]
            names = {"content-type", "openai-model", "cache-control", "x-accel-buffering", "openai-version"}
            assert {n: again.headers.get(n) for n in names} == {n: first.headers.get(n) for n in names}
            assert not [n for n in again.headers if n.startswith(("x-ratelimit", "x-request-cost", "x-quota"))]
        assert len(provider.received) == 1
        assert (await pair.books.entry(tenant))["request_id"] == first.headers["x-request-id"]
        lines = await eventually(lambda: [c for c in pair.one.calls() if c.get("key_id") == tenant.key_id][1:])
        assert [(line["outcome"], line["status"]) for line in lines] == [("replayed", 200)]

    async def test_who_has_read_done_can_have_it_again_whatever_the_provider_does_next(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        gate = Gate()

        async def linger(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_events(chunk("a"), chunk(finish="stop"), chunk(usage=USED), b"[DONE]", end=False)
            await gate.opened.wait()
            await exchange.end()

        provider.scripts.append(linger)
        first = await connected(pair.one, tenant, name, chat(_PRICED, stream=True))
        await first.head()
        read = b""
        while not read.endswith(b"data: [DONE]\n\n"):
            read += await first.chunk()
        for gateway in (pair.other, pair.one):
            assert (await ask(gateway, tenant, name, chat(_PRICED, stream=True))).body == read
        gate.opened.set()
        assert await first.chunk() == b""
        first.close()

    @pytest.mark.parametrize("options", [{}, {"include_usage": True}, {"include_usage": True, "include_cost": True}])
    async def test_usage_is_shown_or_hidden_as_it_was_the_first_time(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str, options: dict[str, bool]
    ) -> None:
        provider.scripts.append(stream("a"))
        body = chat(_PRICED, stream=True, stream_options=options)
        first = await ask(pair.one, tenant, name, body)
        assert (b'"usage":{' in first.body, b"cost_usd" in first.body) == (bool(options), "include_cost" in options)
        assert (await ask(pair.other, tenant, name, body)).body == first.body

    async def test_embeddings_and_forms_too_whatever_boundary_the_client_chooses(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        """Guarantee: clients choose a new boundary when they try again; that does not make it another request."""
        embed = keyed(tenant, name + "e", b'{"model":"idem","input":"x"}', "/v1/embeddings")
        forms = [
            keyed(
                tenant, name, _FORM.format(b).encode(), "/v1/audio/transcriptions", f"multipart/form-data; boundary={b}"
            )
            for b in ("first", "second")
        ]
        for requests in ((embed, embed), forms):
            got = [await call(pair.one.port, request) for request in requests]
            assert [(one.status, is_replayed(one)) for one in got] == [(200, False), (200, True)]
        other = _FORM.format("third").replace("RIFF", "RIFX").encode()
        request = keyed(tenant, name, other, "/v1/audio/transcriptions", "multipart/form-data; boundary=third")
        assert (await call(pair.one.port, request)).status == 422
        assert len(provider.received) == 2

    async def test_a_whole_answer_to_a_request_for_a_stream(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        got = [await ask(pair.one, tenant, name, chat(_PRICED, stream=True)) for _ in range(2)]
        assert got[0].body == got[1].body == chat_answer()
        assert got[1].headers["content-type"] == "application/json"

    @pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
    async def test_callers_of_http_1_0_read_to_the_end_of_the_connection(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str, is_stream: bool
    ) -> None:
        provider.default = stream("a") if is_stream else provider.default
        request = keyed(tenant, name, chat(_PRICED, stream=is_stream)).replace(b"HTTP/1.1", b"HTTP/1.0")
        read: list[list[bytes]] = []
        for _ in range(2):
            connection = await RawConnection.open(pair.one.port)
            await connection.send(request)
            read.append((await connection.reader.read()).split(b"\r\n\r\n", 1))
            connection.close()
        assert read[0][1] == read[1][1]
        assert b"idempotent-replayed: true\r\n" in read[1][0]
        assert len(provider.received) == 1

    async def test_the_official_client_gets_the_same_objects(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        hello = [{"role": "user", "content": "Hello!"}]
        async with AsyncOpenAI(api_key=tenant.key, base_url=f"{pair.one.url}/v1", max_retries=0) as client:
            create = client.chat.completions.create
            headers = {"Idempotency-Key": name}
            whole = [await create(model=_PRICED, messages=hello, extra_headers=headers) for _ in range(2)]
            provider.scripts.append(stream("a", "b"))
            headers = {"Idempotency-Key": f"{name}-stream"}
            chunks = [
                [c async for c in await create(model=_PRICED, messages=hello, stream=True, extra_headers=headers)]
                for _ in range(2)
            ]
            headers = {"Idempotency-Key": f"{name}-file"}
            transcribe = client.audio.transcriptions.with_raw_response.create
            provider.default = answer(b'{"text":"said"}')
            said = [await transcribe(model=_PRICED, file=("a.wav", b"RIFF"), extra_headers=headers) for _ in range(2)]
        assert whole[0] == whole[1]
        assert chunks[0] == chunks[1] != []
        assert [one.headers.get("idempotent-replayed") for one in said] == [None, "true"]
        assert len(provider.received) == 3


class TestOther:
    async def test_another_body_or_route_under_the_same_key_is_refused_and_never_sent(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        gate = Gate()
        provider.scripts.append(gate.whole)
        body = chat(_PRICED)
        first = asyncio.create_task(ask(pair.one, tenant, name, body))
        await gate.begun.wait()
        others = (keyed(tenant, name, chat(_PRICED, text="other")), keyed(tenant, name, body, "/v1/completions"))

        async def require_refused() -> None:
            for gateway, other in itertools.product((pair.one, pair.other), others):
                got = await call(gateway.port, other)
                assert (got.status, got.error()["code"]) == (422, "idempotency_key_reused")

        await require_refused()
        gate.opened.set()
        await first
        await require_refused()
        assert len(provider.received) == 1

    async def test_the_same_key_of_another_api_key_is_another_request(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, database: Database, stores: TestStores, name: str
    ) -> None:
        """Guarantee: nobody reads another key's answer, not even within a project."""
        async with database.transaction() as session:
            second = await create_key(
                session,
                NewKey(name="second"),
                organization_id=tenant.organization_id,
                project_id=tenant.project_id,
                pepper=stores.pepper,
            )
        for secret, text in ((tenant.key, "mine"), (second.secret, "theirs")):
            provider.scripts.append(answer(chat_answer(text)))
            got = await ask(pair.one, tenant._replace(key=secret), name, chat(_PRICED))
            assert (is_replayed(got), text.encode() in got.body) == (False, True)
        assert len(provider.received) == 2

    @pytest.mark.parametrize("bad", ["", "x" * 256, "a\tb", "clé"], ids=["empty", "long", "tab", "not ASCII"])
    async def test_a_key_that_is_none_is_refused(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, bad: str
    ) -> None:
        got = await ask(pair.one, tenant, bad, chat(_PRICED))
        assert (got.status, got.error()["code"]) == (400, "idempotency_key_invalid")
        assert provider.received == []

    async def test_a_control_character_is_not_even_a_header(self, pair: Pair, tenant: Tenant) -> None:
        got = await ask(pair.one, tenant, "a\x01b", chat(_PRICED))
        assert (got.status, got.error()["code"]) == (400, "malformed_request")

    async def test_the_longest_key_is_taken(self, pair: Pair, provider: FakeProvider, tenant: Tenant) -> None:
        got = [await ask(pair.one, tenant, "~" * 255, chat(_PRICED)) for _ in range(2)]
        assert [is_replayed(one) for one in got] == [False, True]

    async def test_what_is_refused_without_asking_a_provider_holds_no_key(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        for body in (chat("absent"), b'{"model":', b'{"stream":1,"model":"idem","messages":[]}'):
            assert (await ask(pair.one, tenant, name, body)).status in {400, 404}
        assert await pair.books.states(tenant) == []
        assert (await ask(pair.one, tenant, name, chat(_PRICED))).status == 200


class TestFailures:
    async def test_a_refusal_of_the_provider_is_everybodys_and_the_next_request_is_the_first_again(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, model: str, name: str
    ) -> None:
        gate = Gate()

        async def refuse(exchange: Exchange) -> None:
            await gate.opened.wait()
            await answer(b'{"error":{"message":"no"}}', status=400)(exchange)

        provider.scripts.append(refuse)
        calls = [asyncio.create_task(ask(pair.one, tenant, name, chat(model))) for _ in range(5)]
        await runs(5, pair.one)
        gate.opened.set()
        got = await asyncio.gather(*calls)
        assert {(one.status, one.body) for one in got} == {(400, b'{"error":{"message":"no"}}')}
        assert await pair.books.states(tenant) == []
        assert (await ask(pair.other, tenant, name, chat(model))).status == 200
        assert len(provider.received) == 2

    async def test_a_provider_that_cannot_be_reached_is_everybodys_error(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, model: str, name: str
    ) -> None:
        gate = Gate()
        provider.default = gate.cut
        calls = [asyncio.create_task(ask(pair.one, tenant, name, chat(model))) for _ in range(5)]
        await runs(5, pair.one)
        gate.opened.set()
        got = await asyncio.gather(*calls)
        assert {(one.status, one.error()["code"]) for one in got} == {(502, "upstream_unreachable")}
        asked = len(provider.received)
        assert asked < 5
        provider.default = answer(chat_answer())
        assert (await ask(pair.one, tenant, name, chat(model))).status == 200
        assert len(provider.received) == asked + 1

    async def test_a_stream_that_breaks_off_ends_with_an_error_for_everybody(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, model: str, name: str
    ) -> None:
        """Guarantee: nobody reads a false [DONE], and nobody is given the half of an answer later."""
        gate = Gate()
        provider.scripts.append(gate.broken)
        body = chat(model, stream=True)
        calls = [asyncio.create_task(ask(pair.one, tenant, name, body)) for _ in range(5)]
        await runs(5, pair.one)
        await gate.begun.wait()
        gate.opened.set()
        for got in await asyncio.gather(*calls):
            events = got.body.strip().split(b"\n\n")
            assert len(events) == 2
            assert msgspec.json.decode(events[1].removeprefix(b"data: "))["error"]["code"] == "upstream_unreachable"
        provider.scripts.append(stream("a"))
        again = await ask(pair.other, tenant, name, body)
        assert (is_replayed(again), again.body.endswith(b"[DONE]\n\n")) == (False, True)

    async def test_an_error_event_of_the_provider_is_not_kept(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, model: str, name: str
    ) -> None:
        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            await exchange.send_events(chunk("a"), b'{"error":{"message":"overloaded"}}', end=False)
            await exchange.end()

        provider.scripts.append(play)
        assert b"overloaded" in (await ask(pair.one, tenant, name, chat(model, stream=True))).body
        assert await pair.books.states(tenant) == []


class TestLeaving:
    @pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
    async def test_under_drain_a_caller_who_comes_back_finds_the_answer(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str, is_stream: bool
    ) -> None:
        gate = Gate()
        provider.scripts.append(gate.stream if is_stream else gate.whole)
        body = chat(_PRICED, stream=is_stream)
        first = await connected(pair.one, tenant, name, body)
        await gate.begun.wait()
        first.reset()
        back = asyncio.create_task(ask(pair.one, tenant, name, body))
        await runs(2, pair.one)
        gate.opened.set()
        assert is_replayed(await back)
        assert (await ask(pair.other, tenant, name, body)).body == (await back).body
        assert len(provider.received) == 1
        assert (await pair.books.entry(tenant))["quality"] == "exact"

    async def test_under_abort_the_provider_is_stopped_and_the_next_request_is_the_first_again(
        self, pair: Pair, provider: FakeProvider, aborting: Tenant, model: str, name: str
    ) -> None:
        gate = Gate()
        provider.scripts.append(gate.stream)
        first = await connected(pair.one, aborting, name, chat(model, stream=True))
        await first.head()
        first.reset()
        await asyncio.wait_for(provider.exchanges[0].hung_up.wait(), 1)
        gate.opened.set()
        provider.scripts.append(stream("a"))
        again = await ask(pair.other, aborting, name, chat(model, stream=True))
        assert (again.status, is_replayed(again), len(provider.received)) == (200, False, 2)

    async def test_under_abort_the_call_goes_on_while_somebody_follows_and_no_longer(
        self, pair: Pair, provider: FakeProvider, aborting: Tenant, model: str, name: str
    ) -> None:
        steps = asyncio.Semaphore(0)

        async def play(exchange: Exchange) -> None:
            await exchange.send_head()
            for number in itertools.count():
                await exchange.send_events(chunk(f"w{number}"), end=False)
                await steps.acquire()

        provider.scripts.append(play)
        body = chat(model, stream=True)
        first = await connected(pair.one, aborting, name, body)
        await first.head()
        joiner = await connected(pair.one, aborting, name, body)
        await joiner.head()
        assert b"w0" in await joiner.chunk()
        first.reset()
        for number in (1, 2):
            steps.release()
            assert f"w{number}".encode() in await joiner.chunk()
        assert not provider.exchanges[0].hung_up.is_set()
        joiner.reset()
        await asyncio.wait_for(provider.exchanges[0].hung_up.wait(), 1)
        steps.release()
        entry = await pair.books.entry(aborting)
        assert (entry["outcome"], entry["quality"]) == ("client_gone", "estimated")
        assert await pair.books.states(aborting) == []

    async def test_who_joined_may_leave_and_takes_no_place_afterwards(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        gate = Gate()
        provider.scripts.append(gate.whole)
        first = asyncio.create_task(ask(pair.one, tenant, name, chat(_PRICED)))
        await gate.begun.wait()
        guests = [await connected(gateway, tenant, name, chat(_PRICED)) for gateway in pair[:2]]
        await runs(3, *pair[:2])
        for guest in guests:
            guest.reset()
        await runs(1, *pair[:2])
        gate.opened.set()
        assert (await first).status == 200

    async def test_of_those_who_wait_for_another_process_one_may_leave(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        """Guarantee: the one among them who asks PostgreSQL for all hands that over when it leaves."""
        gate = Gate()
        provider.scripts.append(gate.whole)
        first = asyncio.create_task(ask(pair.one, tenant, name, chat(_PRICED)))
        await gate.begun.wait()
        asking = await connected(pair.other, tenant, name, chat(_PRICED))
        await runs(1, pair.other)
        others = [asyncio.create_task(ask(pair.other, tenant, name, chat(_PRICED))) for _ in range(3)]
        await runs(4, pair.other)
        asking.reset()
        await runs(3, pair.other)
        gate.opened.set()
        assert {one.body for one in await asyncio.gather(first, *others)} == {chat_answer(usage=USED)}
        assert len(provider.received) == 1


class TestKept:
    @pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
    async def test_too_large_an_answer_is_given_once_and_refused_afterwards(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str, is_stream: bool
    ) -> None:
        """Guarantee: also then the provider is not asked again, and the official clients do not try on and on."""
        texts = ["x" * 60_000] * 20
        provider.scripts.append(stream(*texts) if is_stream else answer(chat_answer("".join(texts))))
        body = chat(_PRICED, stream=is_stream)
        assert (await ask(pair.one, tenant, name, body)).status == 200
        for gateway in (pair.one, pair.other):
            got = await ask(gateway, tenant, name, body)
            assert (got.status, got.error()["code"]) == (409, "idempotent_answer_too_large")
            assert got.headers["x-should-retry"] == "false"
        assert len(provider.received) == 1
        assert await pair.books.states(tenant) == ["too_large"]

    async def test_who_waits_for_a_whole_answer_that_is_too_large_is_told_so(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        """Guarantee: never an empty answer in its place."""
        gate = Gate(*["x" * 60_000] * 20)
        provider.scripts.append(gate.whole)
        first = asyncio.create_task(ask(pair.one, tenant, name, chat(_PRICED)))
        await gate.begun.wait()
        waiting = asyncio.create_task(ask(pair.one, tenant, name, chat(_PRICED)))
        await runs(2, pair.one)
        gate.opened.set()
        assert len((await first).body) > 1_000_000
        got = await waiting
        assert (got.status, got.error()["code"]) == (409, "idempotent_answer_too_large")

    async def test_an_answer_that_has_expired_is_as_good_as_none(
        self, pair: Pair, provider: FakeProvider, tenant: Tenant, database: Database, name: str
    ) -> None:
        body = chat(_PRICED)
        for kept in (name, name + "-kept"):
            assert (await ask(pair.one, tenant, kept, body)).status == 200
        expire = "UPDATE idempotent_answers SET expires_at = now() - interval '1 s' WHERE idempotency_key = $1"
        await pair.books.rows(expire, kept_as(name))
        assert not is_replayed(await ask(pair.other, tenant, name, chat(_PRICED, text="other")))
        assert is_replayed(await ask(pair.one, tenant, name, chat(_PRICED, text="other")))
        await pair.books.rows(expire, kept_as(name))
        assert await prune(database) >= 1
        assert await pair.books.states(tenant) == ["done"]
        assert is_replayed(await ask(pair.one, tenant, name + "-kept", body))
        [row] = await pair.books.rows(
            "SELECT expires_at - claimed_at AS kept FROM idempotent_answers WHERE key_id = $1", tenant.key_id
        )
        assert 86_000 < row["kept"].total_seconds() < 86_500

    async def test_switched_off_the_header_does_nothing(
        self, stores: TestStores, provider: FakeProvider, tenant: Tenant, workdir, name: str
    ) -> None:
        config = config_for(provider.base_url)
        async with Gateway(stores, workdir, config, AAP_IDEMPOTENCY_SECONDS="0") as gateway:
            got = [await ask(gateway, tenant, key, chat()) for key in (name, name, "x" * 300)]
        assert [(one.status, is_replayed(one)) for one in got] == [(200, False)] * 3
        assert len(provider.received) == 3
