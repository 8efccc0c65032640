"""`/v1/organization/usage/*` and `/costs`, as the official client drives them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import msgspec
import openai
import pytest
from openai import AsyncOpenAI
from openai.types.admin.organization import (
    usage_audio_speeches_params,
    usage_audio_transcriptions_params,
    usage_code_interpreter_sessions_params,
    usage_completions_params,
    usage_costs_params,
    usage_embeddings_params,
    usage_file_search_calls_params,
    usage_images_params,
    usage_moderations_params,
    usage_vector_stores_params,
    usage_web_search_calls_params,
)

from core.database import Database
from gateway.routes import usage_forms as forms
from gateway.routes.usage import OPERATIONS
from inference.endpoints import ENDPOINTS
from keys.lifecycle import NewKey, create_key
from keys.scopes import ADMIN_SCOPES
from tests.harness.eventually import eventually
from tests.harness.gateway import Gateway
from tests.harness.provider import FakeProvider
from tests.harness.raw import RawAnswer, call, chat, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant
from tests.harness.usage_rows import add_window

DAY = datetime(2026, 3, 2, tzinfo=UTC)
START = int(DAY.timestamp())
END = START + 3 * 86_400
# The client's method → its parameters, our form of them.
METHODS: dict[str, tuple[Any, type[msgspec.Struct]]] = {
    "completions": (usage_completions_params.UsageCompletionsParams, forms.CompletionsQuery),
    "embeddings": (usage_embeddings_params.UsageEmbeddingsParams, forms.ModelUsageQuery),
    "moderations": (usage_moderations_params.UsageModerationsParams, forms.ModelUsageQuery),
    "images": (usage_images_params.UsageImagesParams, forms.ImagesQuery),
    "audio_speeches": (usage_audio_speeches_params.UsageAudioSpeechesParams, forms.ModelUsageQuery),
    "audio_transcriptions": (usage_audio_transcriptions_params.UsageAudioTranscriptionsParams, forms.ModelUsageQuery),
    "vector_stores": (usage_vector_stores_params.UsageVectorStoresParams, forms.ProjectUsageQuery),
    "code_interpreter_sessions": (
        usage_code_interpreter_sessions_params.UsageCodeInterpreterSessionsParams,
        forms.ProjectUsageQuery,
    ),
    "file_search_calls": (usage_file_search_calls_params.UsageFileSearchCallsParams, forms.FileSearchCallsQuery),
    "web_search_calls": (usage_web_search_calls_params.UsageWebSearchCallsParams, forms.WebSearchCallsQuery),
    "costs": (usage_costs_params.UsageCostsParams, forms.CostsQuery),
}
PATHS = [f"/v1/organization/{'' if name == 'costs' else 'usage/'}{name}" for name in METHODS]
SERVED = ("completions", "embeddings", "images", "audio_transcriptions", "costs")


class Books(NamedTuple):
    """An organization with a key for calling models and one for its books."""

    tenant: Tenant
    admin_key: str


@pytest.fixture
async def books(database: Database, stores: TestStores) -> Books:
    tenant = await new_tenant(database, stores.pepper)
    async with database.transaction() as session:
        admin = await create_key(
            session,
            NewKey(name="admin", scopes=ADMIN_SCOPES),
            organization_id=tenant.organization_id,
            project_id=tenant.project_id,
            pepper=stores.pepper,
        )
    return Books(tenant, admin.secret)


@pytest.fixture
async def client(gateway: Gateway, books: Books) -> AsyncIterator[AsyncOpenAI]:
    async with client_for(gateway, books) as made:
        yield made


@contextlib.asynccontextmanager
async def client_for(gateway: Gateway, books: Books) -> AsyncIterator[AsyncOpenAI]:
    """The official client, which here refuses an answer that is not of its own form."""
    async with AsyncOpenAI(
        api_key=books.tenant.key,
        admin_api_key=books.admin_key,
        base_url=f"{gateway.url}/v1",
        max_retries=0,
        _strict_response_validation=True,
    ) as made:
        yield made


async def use(database: Database, books: Books, at: timedelta = timedelta(), **columns: Any) -> None:
    async with database.transaction() as session:
        await add_window(session, books.tenant.organization_id, DAY + at, **columns)


async def ask(gateway: Gateway, key: str, path: str, query: str = "") -> RawAnswer:
    head = f"GET {path}{'?' if query else ''}{query} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\n\r\n"
    return await call(gateway.port, head.encode())


async def ask_client(client: AsyncOpenAI, method: str, **parameters: Any) -> Any:
    return await getattr(client.admin.organization.usage, method)(
        **{"start_time": START, "end_time": END, **parameters}
    )


class TestForms:
    """What OpenAI's client may send and what it reads are what we take and give."""

    @pytest.mark.parametrize("method", METHODS)
    def test_we_take_what_the_client_can_send_and_nothing_else(self, method: str) -> None:
        theirs, ours = METHODS[method]
        hints = get_type_hints(theirs)
        kinds = get_type_hints(ours)
        assert hints.keys() == kinds.keys()
        for name, hint in hints.items():
            is_list = "Sequence" in str(hint) or get_origin(hint) is list
            assert is_list == (get_origin(kinds[name]) is tuple), name
            if get_origin(hint) is list:
                assert set(get_args(get_args(hint)[0])) == set(get_args(get_args(kinds[name])[0])), name

    @pytest.mark.parametrize("method", METHODS)
    async def test_every_method_is_answered_with_whole_buckets(self, client: AsyncOpenAI, method: str) -> None:
        page = await ask_client(client, method)
        assert (page.object, page.has_more, page.next_page) == ("page", False, None)
        assert [(bucket.start_time, bucket.end_time, bucket.results) for bucket in page.data] == [
            (START + day * 86_400, START + (day + 1) * 86_400, []) for day in range(3)
        ]

    def test_every_operation_is_told_of_once(self) -> None:
        """Guarantee: a route that is added to the data plane does not go missing from the usage API."""
        told = [operation for operations in OPERATIONS.values() for operation in operations]
        assert sorted(told) == sorted({endpoint.operation for endpoint in ENDPOINTS})

    async def test_they_are_described(self, gateway: Gateway, books: Books) -> None:
        document = (await ask(gateway, books.admin_key, "/openapi.json")).json()
        for path, (theirs, _) in zip(PATHS, METHODS.values(), strict=True):
            operation = document["paths"][path]["get"]  # type: ignore[index]
            parameters = {parameter["name"]: parameter for parameter in operation["parameters"]}
            assert parameters.keys() == get_type_hints(theirs).keys()
            assert parameters["start_time"]["required"]
            assert parameters["group_by"]["schema"]["type"] == "array"
            assert "project_id" in parameters["group_by"]["schema"]["items"]["enum"]
            assert operation["security"] == [{"bearer": []}]

    async def test_idempotency_and_the_cost_of_calls_are_described(
        self, gateway: Gateway, provider: FakeProvider, books: Books
    ) -> None:
        """Guarantee: on every hot route; and under the names that are sent."""
        document = (await ask(gateway, books.admin_key, "/openapi.json")).json()
        for endpoint in ENDPOINTS:
            operation = document["paths"][f"/v1{endpoint.path}"]["post"]  # type: ignore[index]
            [parameter] = operation["parameters"]
            assert (parameter["name"], parameter["in"], parameter["required"]) == ("Idempotency-Key", "header", False)
            assert (parameter["schema"]["type"], parameter["schema"]["maxLength"]) == ("string", 255)
            assert re.search(parameter["schema"]["pattern"], "order 1017/~summary!")
            assert not re.search(parameter["schema"]["pattern"], "tab\t")
            assert {"409", "422"} < operation["responses"].keys()
            described = operation["responses"]["200"]["headers"]
            assert described.keys() >= {"Idempotent-Replayed", "x-request-cost-usd"}
        asked = post("/v1/chat/completions", books.tenant.key, chat(), f"idempotency-key: {books.tenant.key_id}")
        await call(gateway.port, asked)
        replayed = await call(gateway.port, asked)
        sent = {name: header for name, header in described.items() if name.lower() in replayed.headers}
        assert sent.keys() == {"Idempotent-Replayed", "Original-Request"}
        assert sent["Idempotent-Replayed"]["schema"]["enum"] == [replayed.headers["idempotent-replayed"]]


class TestResults:
    async def test_a_call_is_told_of_as_its_provider_counted_it(
        self, gateway: Gateway, provider: FakeProvider, client: AsyncOpenAI, books: Books
    ) -> None:
        answered = await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}])
        assert answered.usage is not None

        yesterday = int((datetime.now(UTC) - timedelta(days=1)).timestamp())

        async def told() -> Any:
            page = await client.admin.organization.usage.completions(
                start_time=yesterday, group_by=["model", "api_key_id", "project_id"]
            )
            return [result for bucket in page.data for result in bucket.results]

        [result] = await eventually(told)
        assert (result.model, result.api_key_id, result.project_id, result.num_model_requests) == (
            *("fake", books.tenant.key_id, books.tenant.project_id),
            1,
        )
        assert (result.input_tokens, result.output_tokens) == (
            answered.usage.prompt_tokens,
            answered.usage.completion_tokens,
        )

    async def test_completions(self, client: AsyncOpenAI, database: Database, books: Books) -> None:
        units = {
            "input_tokens": 1,
            "cached_input_tokens": 10,
            "cache_write_tokens": 100,
            "cache_write_1h_tokens": 1_000,
            "input_audio_tokens": 10_000,
            "input_image_tokens": 100_000,
            "output_tokens": 2,
            "reasoning_tokens": 20,
            "output_audio_tokens": 200,
            "output_image_tokens": 2_000,
        }
        await use(database, books, requests=3, **units)
        await use(database, books, operation="text_completion", requests=4, output_tokens=40_000)
        await use(database, books, operation="embeddings", requests=100, input_tokens=10**9)
        [bucket, *_] = (await ask_client(client, "completions")).data
        [result] = bucket.results
        assert result.model_dump() == {
            "object": "organization.usage.completions.result",
            "num_model_requests": 7,
            "input_tokens": 111_111,
            "input_cached_tokens": 10,
            "input_cache_write_tokens": 1_100,
            "input_uncached_tokens": 110_001,
            "input_text_tokens": 1,
            "input_cached_text_tokens": 10,
            "input_audio_tokens": 10_000,
            "input_cached_audio_tokens": 0,
            "input_image_tokens": 100_000,
            "input_cached_image_tokens": 0,
            "output_tokens": 42_222,
            "output_text_tokens": 40_022,
            "output_audio_tokens": 200,
            "output_image_tokens": 2_000,
            **dict.fromkeys(("project_id", "user_id", "api_key_id", "model", "batch", "service_tier")),
        }

    async def test_the_others(self, client: AsyncOpenAI, database: Database, books: Books) -> None:
        await use(database, books, operation="embeddings", requests=2, input_tokens=30, model="small")
        await use(database, books, operation="image_generation", requests=3, images=5, model="draw")
        await use(database, books, operation="transcription", requests=4, audio_seconds=77, model="hear")
        found = {}
        for method in ("embeddings", "images", "audio_transcriptions"):
            [bucket, *_] = (await ask_client(client, method, group_by=["model", "user_id"])).data
            [result] = bucket.results
            found[method] = {name: value for name, value in result.model_dump().items() if value is not None}
        assert found == {
            "embeddings": {
                "object": "organization.usage.embeddings.result",
                "model": "small",
                "num_model_requests": 2,
                "input_tokens": 30,
            },
            "images": {
                "object": "organization.usage.images.result",
                "model": "draw",
                "num_model_requests": 3,
                "images": 5,
            },
            "audio_transcriptions": {
                "object": "organization.usage.audio_transcriptions.result",
                "model": "hear",
                "num_model_requests": 4,
                "seconds": 77,
            },
        }
        [bucket, *_] = (await ask_client(client, "images", group_by=["source", "size"])).data
        assert (bucket.results[0].source, bucket.results[0].size) == ("image.generation", None)

    async def test_costs_are_exact(
        self, gateway: Gateway, client: AsyncOpenAI, database: Database, books: Books
    ) -> None:
        """Guarantee: an amount is told to the nano-dollar; binary fractions would have made 0.30000000000000004 of it."""
        await use(database, books, charge_nano_usd=100_000_000, cost_nano_usd=7)
        await use(database, books, model="other", charge_nano_usd=200_000_000)
        await use(database, books, timedelta(days=1), charge_nano_usd=123_456_789_012_345_678)
        await use(database, books, timedelta(days=2), requests=0, charge_nano_usd=-1)
        first, *_ = (await ask_client(client, "costs")).data
        amount = first.results[0].amount
        assert (amount.value, amount.currency) == (0.3, "usd")
        got = await ask(gateway, books.admin_key, "/v1/organization/costs", f"start_time={START}&end_time={END}")
        for exact in (b'"value":0.3,', b'"value":123456789.012345678,', b'"value":-0.000000001,'):
            assert exact in got.body
        [first, *_] = (await ask_client(client, "costs", group_by=["line_item", "api_key_id", "project_id"])).data
        assert [(one.line_item, one.api_key_id, one.project_id, one.amount.value) for one in first.results] == [
            ("fake", "key_1", "proj_1", 0.1),
            ("other", "key_1", "proj_1", 0.2),
        ]


class TestFiltersAndGroups:
    @pytest.fixture(autouse=True)
    async def used(self, database: Database, books: Books) -> None:
        await use(database, books, requests=1)
        await use(database, books, requests=2, project_id="proj_2", key_id="key_2")
        await use(database, books, requests=4, model="other", service_tier="batch")

    @pytest.mark.parametrize(
        ("parameters", "expected"),
        [
            ({}, [7]),
            ({"group_by": ["model"]}, [3, 4]),
            ({"group_by": ["project_id", "api_key_id"]}, [5, 2]),
            ({"group_by": ["batch"]}, [3, 4]),
            ({"group_by": ["service_tier", "model", "user_id"]}, [4, 3]),
            ({"group_by": ["model", "model"]}, [3, 4]),
            ({"project_ids": ["proj_2"]}, [2]),
            ({"api_key_ids": ["key_1", "key_2"]}, [7]),
            ({"models": ["other", "x"]}, [4]),
            ({"batch": True}, [4]),
            ({"batch": False, "group_by": ["project_id"]}, [1, 2]),
            ({"user_ids": ["user_1"]}, []),
            ({"models": [], "group_by": []}, [7]),
        ],
    )
    async def test_as_the_client_sends_them(
        self, client: AsyncOpenAI, parameters: dict[str, Any], expected: list[int]
    ) -> None:
        [bucket, *_] = (await ask_client(client, "completions", **parameters)).data
        assert [result.num_model_requests for result in bucket.results] == expected
        assert all(result.user_id is None for result in bucket.results)

    @pytest.mark.parametrize(
        "query", ["project_ids=proj_1&project_ids=proj_2", "project_ids[]=proj_1&project_ids%5B%5D=proj_2"]
    )
    async def test_lists_come_in_both_spellings(self, gateway: Gateway, books: Books, query: str) -> None:
        path = "/v1/organization/usage/completions"
        got = await ask(gateway, books.admin_key, path, f"start_time={START}&end_time={END}&{query}")
        assert [one["num_model_requests"] for one in got.json()["data"][0]["results"]] == [7]  # type: ignore[index]

    async def test_what_is_not_recorded_matches_nothing(
        self, client: AsyncOpenAI, database: Database, books: Books
    ) -> None:
        await use(database, books, operation="image_generation", images=1)
        for parameters, count in (
            ({"sources": ["image.generation"]}, 1),
            ({"sources": ["image.edit"]}, 0),
            ({"sizes": ["256x256"]}, 0),
        ):
            [bucket, *_] = (await ask_client(client, "images", **parameters)).data
            assert len(bucket.results) == count


class TestPages:
    @pytest.mark.parametrize(("width", "limit"), [("1d", 2), ("1h", 24), ("1h", 100)])
    async def test_next_page_leads_to_the_end(
        self, client: AsyncOpenAI, database: Database, books: Books, width: str, limit: int
    ) -> None:
        for hour in (0, 5, 24, 47, 70):
            await use(database, books, timedelta(hours=hour), requests=10**4 + hour)
        whole, page = [], None
        while True:
            more = {} if page is None else {"page": page}
            got = await ask_client(client, "completions", bucket_width=width, limit=limit, **more)
            assert len(got.data) <= limit
            whole += got.data
            page = got.next_page
            assert got.has_more == (page is not None)
            if page is None:
                break
        assert [bucket.start_time for bucket in whole] == list(range(START, END, 86_400 if width == "1d" else 3_600))
        assert sum(result.num_model_requests for bucket in whole for result in bucket.results) == 5 * 10**4 + 146

    async def test_minutes(self, client: AsyncOpenAI, database: Database, books: Books) -> None:
        yesterday = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=1)
        await use(database, books, yesterday + timedelta(minutes=61) - DAY, seconds=60, requests=5)
        times = {"start_time": int(yesterday.timestamp()), "end_time": int(yesterday.timestamp()) + 2 * 86_400}
        got = await ask_client(client, "completions", bucket_width="1m", limit=1440, **times)
        assert [len(bucket.results) for bucket in got.data] == [number == 61 for number in range(1440)]
        assert got.data[61].results[0].num_model_requests == 5
        assert got.has_more


class TestRefused:
    @pytest.mark.parametrize(
        ("query", "param"),
        [
            ("", "start_time"),
            ("start_time=soon", "start_time"),
            ("start_time=-1", "start_time"),
            (f"start_time={START}000", "start_time"),
            (f"start_time={'9' * 400}", "start_time"),
            (f"start_time={START}&start_time={START}", "start_time"),
            (f"start_time={START}&end_time={START}", "end_time"),
            (f"start_time={START}&bucket_width=1w", "bucket_width"),
            (f"start_time={START}&limit=32", "limit"),
            (f"start_time={START}&limit=", "limit"),
            (f"start_time={START}&group_by=colour", "group_by"),
            (f"start_time={START}&page=page_1", "page"),
            (f"start_time={START}&modles=fake", "modles"),
            (f"start_time={START}&limit[]=1", "limit[]"),
            (f"start_time={START}&%73%6b=1", "sk"),
            (f"start_time={START}&models=%ff", None),
            (f"start_time={START}&models=a%00b", None),
        ],
    )
    async def test_a_query_that_is_wrong_is_refused_by_name(
        self, gateway: Gateway, books: Books, query: str, param: str | None
    ) -> None:
        got = await ask(gateway, books.admin_key, "/v1/organization/usage/completions", query)
        assert got.status == 400
        assert got.error()["param"] == param
        assert param is None or param in str(got.error()["message"])

    async def test_a_key_in_the_query_is_not_repeated(self, gateway: Gateway, books: Books) -> None:
        got = await ask(gateway, books.admin_key, "/v1/organization/costs", f"start_time=1&{books.admin_key}=1")
        assert got.status == 400
        assert books.admin_key[20:] not in got.body.decode()
        assert books.admin_key[20:] not in gateway.log

    @pytest.mark.parametrize("path", PATHS)
    async def test_a_key_for_calling_models_is_forbidden(self, gateway: Gateway, books: Books, path: str) -> None:
        got = await ask(gateway, books.tenant.key, path, f"start_time={START}")
        assert (got.status, got.error()["code"]) == (403, "insufficient_permissions")
        assert (await ask(gateway, "sk-aap-nope", path, f"start_time={START}")).status == 401

    async def test_an_admin_key_calls_nothing(self, gateway: Gateway, books: Books) -> None:
        async with AsyncOpenAI(api_key=books.admin_key, base_url=f"{gateway.url}/v1", max_retries=0) as client:
            with pytest.raises(openai.PermissionDeniedError):
                await client.chat.completions.create(model="fake", messages=[{"role": "user", "content": "hi"}])
            with pytest.raises(openai.PermissionDeniedError):
                await client.embeddings.create(model="fake", input="hi")
            with pytest.raises(openai.PermissionDeniedError):
                await client.models.list()


class TestTenancy:
    @pytest.mark.parametrize("method", SERVED)
    async def test_another_organizations_usage_never_shows(
        self, gateway: Gateway, database: Database, stores: TestStores, books: Books, method: str
    ) -> None:
        """Guarantee: not even to who names its projects, keys and models. The answer is that of an organization without usage."""
        for operation in ("chat", "embeddings", "image_generation", "transcription"):
            await use(database, books, operation=operation, images=1, audio_seconds=1, charge_nano_usd=5)
        stranger = Books(
            books.tenant, (await new_tenant(database, stores.pepper, NewKey(name="s", scopes=ADMIN_SCOPES))).key
        )
        async with client_for(gateway, books) as own, client_for(gateway, stranger) as other:
            assert (await ask_client(own, method)).data[0].results
            for parameters in ({}, {"project_ids": ["proj_1"], "api_key_ids": ["key_1"]}, {"group_by": ["project_id"]}):
                assert [bucket.results for bucket in (await ask_client(other, method, **parameters)).data] == [
                    [],
                    [],
                    [],
                ]
