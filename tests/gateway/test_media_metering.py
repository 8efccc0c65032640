"""Calls that are not billed by their text: pictures by the piece, recordings by the second."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from core.database import Database
from metering.rating import PriceTerms, Rates, Step
from tests.harness.eventually import eventually
from tests.harness.forms import sent_form
from tests.harness.place import Place, open_place
from tests.harness.provider import Exchange, FakeProvider, Script, answer
from tests.harness.raw import RawConnection, call, post
from tests.harness.stores import TestStores
from tests.harness.tenant import Tenant, new_tenant

USD = 10**9 * 10**6
"""A rate of a dollar a unit."""
PRICES = {
    "draw": Rates(images=USD // 25),
    "draw-by-tokens": Rates(input_tokens=10**9, output_tokens=10**9),
    "draw-by-both": Rates(
        images=USD // 25, input_tokens=300_000_000, output_tokens=2_500_000_000, output_image_tokens=30 * 10**9
    ),
    "hear-by-tokens": Rates(input_tokens=10**9, input_audio_tokens=10**9, output_tokens=10**9),
    "hear": Rates(audio_seconds=USD // 10_000, input_tokens=0, output_tokens=0),
    "embed": Rates(input_tokens=10**9, output_tokens=10**12),
}
IMAGES = "/v1/images/generations"
TRANSCRIPTIONS = "/v1/audio/transcriptions"
PICTURE = {"b64_json": "iVBORw0KGgo" * 5_000}


@pytest.fixture(scope="session")
async def place(
    stores: TestStores, shared_provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Place]:
    prices = {model: PriceTerms(tiers={"default": (Step(rates=rates),)}) for model, rates in PRICES.items()}
    async with open_place(stores, shared_provider.base_url, tmp_path_factory.mktemp("media"), prices) as made:
        yield made


def asked(**fields: Any) -> bytes:
    return msgspec.json.encode({"prompt": "a cat", **fields})


def pictures(count: int, **more: Any) -> bytes:
    return msgspec.json.encode({"created": 1, "data": [PICTURE] * count, **more})


def recording(*, bytes_long: int = 100, **fields: str) -> bytes:
    """A form as OpenAI's clients send it."""
    parts = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    )
    file = '--b\r\nContent-Disposition: form-data; name="file"; filename="a.mp3"\r\nContent-Type: audio/mpeg\r\n\r\n'
    return (parts + file).encode() + b"x" * bytes_long + b"\r\n--b--\r\n"


def transcribe(tenant: Tenant, form: bytes) -> bytes:
    return post(TRANSCRIPTIONS, tenant.key, form, content_type="multipart/form-data; boundary=b")


async def leave(place: Place, provider: FakeProvider, request: bytes) -> None:
    """Send a request, and hang up when the provider has it."""
    reached = asyncio.Event()

    async def silent(_: Exchange) -> None:
        reached.set()
        await asyncio.Event().wait()

    provider.scripts.append(silent)
    connection = await RawConnection.open(place.port)
    await connection.send(request)
    await reached.wait()
    connection.reset()


def events(*payloads: dict[str, object]) -> Script:
    async def play(exchange: Exchange) -> None:
        await exchange.send_head()
        await exchange.send_events(*map(msgspec.json.encode, payloads))

    return play


class TestPictures:
    async def test_pictures_are_billed_by_the_piece_where_nobody_reports_usage(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(answer(pictures(3)))
        got = await call(place.port, post(IMAGES, tenant.key, asked(model="draw", n=4)))
        assert (got.status, got.headers["x-request-cost-usd"]) == (200, "0.12")
        entry = await place.entry(tenant)
        assert (entry["images"], entry["input_tokens"], entry["output_tokens"]) == (3, 0, 0)
        assert (entry["quality"], entry["is_unpriced"], entry["cost_nano_usd"]) == ("exact", False, 120_000_000)

    async def test_what_is_priced_by_tokens_alone_is_unpriced_without_usage(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        """Guarantee: the text that a picture is sent as is never billed for tokens."""
        provider.scripts.append(answer(pictures(1)))
        got = await call(place.port, post(IMAGES, tenant.key, asked(model="draw-by-tokens")))
        assert "x-request-cost-usd" not in got.headers
        entry = await place.entry(tenant)
        assert (entry["images"], entry["is_unpriced"], entry["cost_nano_usd"]) == (1, True, 0)

    async def test_a_usage_of_nothing_is_no_usage(self, place: Place, provider: FakeProvider, tenant: Tenant) -> None:
        nothing = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
        provider.scripts.append(answer(pictures(1, usage=nothing)))
        await call(place.port, post(IMAGES, tenant.key, asked(model="draw")))
        assert (await place.entry(tenant))["cost_nano_usd"] == 40_000_000

    async def test_reported_tokens_are_what_is_billed(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        usage = {"input_tokens": 10, "output_tokens": 90, "total_tokens": 100}
        provider.scripts.append(answer(pictures(1, usage=usage)))
        await call(place.port, post(IMAGES, tenant.key, asked(model="draw-by-tokens")))
        entry = await place.entry(tenant)
        assert (entry["images"], entry["cost_nano_usd"], entry["quality"]) == (0, 100_000, "exact")

    async def test_who_hangs_up_under_abort_is_billed_what_was_asked_for(
        self, place: Place, provider: FakeProvider, database: Database, stores: TestStores
    ) -> None:
        tenant = await new_tenant(database, stores.pepper, policy="abort")
        await leave(place, provider, post(IMAGES, tenant.key, asked(model="draw", n=2)))
        entry = await place.entry(tenant)
        assert (entry["images"], entry["quality"], entry["cost_nano_usd"]) == (2, "estimated", 80_000_000)
        assert entry["input_tokens"] == entry["output_tokens"] == 0

    async def test_under_abort_a_price_by_tokens_bills_the_prompt(
        self, place: Place, provider: FakeProvider, database: Database, stores: TestStores
    ) -> None:
        """Guarantee: who leaves before the pictures come has not called for free, whatever the price goes by."""
        tenant = await new_tenant(database, stores.pepper, policy="abort")
        await leave(place, provider, post(IMAGES, tenant.key, asked(model="draw-by-tokens", prompt="x" * 4_000)))
        entry = await place.entry(tenant)
        assert (entry["images"], entry["is_unpriced"], entry["quality"]) == (0, False, "estimated")
        assert entry["cost_nano_usd"] == entry["input_tokens"] * 1_000 > 1_000_000

    async def test_a_price_by_the_piece_counts_pieces_also_where_tokens_are_reported(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        usage = {"generated_images": 2, "output_tokens": 8_000, "total_tokens": 8_000}
        provider.scripts.append(answer(pictures(2, usage=usage)))
        await call(place.port, post(IMAGES, tenant.key, asked(model="draw", n=2)))
        entry = await place.entry(tenant)
        assert (entry["images"], entry["is_unpriced"], entry["cost_nano_usd"]) == (2, False, 80_000_000)

    async def test_so_does_a_stream_of_them(self, place: Place, provider: FakeProvider, tenant: Tenant) -> None:
        usage = {"input_tokens": 10, "output_tokens": 4_000, "total_tokens": 4_010}
        provider.scripts.append(events({"type": "image_generation.completed", "b64_json": "A", "usage": usage}))
        assert (await call(place.port, post(IMAGES, tenant.key, asked(model="draw", stream=True)))).status == 200
        entry = await place.entry(tenant)
        assert (entry["images"], entry["is_unpriced"], entry["quality"]) == (1, False, "estimated")
        assert entry["cost_nano_usd"] == 40_000_000

    @pytest.mark.parametrize(
        ("model", "own", "cost", "charge"),
        [
            ("draw", Rates(input_tokens=10**9, output_tokens=10**9), 0, 4_010_000),
            ("draw-by-tokens", Rates(images=USD // 10), 0, 200_000_000),
            ("draw", Rates(images=USD // 10), 80_000_000, 200_000_000),
        ],
    )
    async def test_an_organizations_own_price_decides_what_is_counted_where_the_two_differ(
        self,
        place: Place,
        provider: FakeProvider,
        tenant: Tenant,
        model: str,
        own: Rates,
        cost: int,
        charge: int,
    ) -> None:
        """Guarantee: what the organization pays by is never nothing; what the provider takes is then not known."""
        await place.set_own_price(tenant, model, own)
        usage = {"input_tokens": 10, "output_tokens": 4_000, "total_tokens": 4_010}

        async def charged() -> bool:
            provider.scripts.append(answer(pictures(2, usage=usage)))
            await call(place.port, post(IMAGES, tenant.key, asked(model=model, n=2)))
            entries = await eventually(lambda: place.entries(tenant))
            return entries[-1]["charge_nano_usd"] == charge

        await eventually(charged, 15)
        assert (await place.entries(tenant))[-1]["cost_nano_usd"] == cost

    @pytest.mark.parametrize(
        ("usage", "cost"),
        [
            # Only the prompt: the pictures came out of no tokens.
            ({"prompt_tokens": 10, "total_tokens": 10}, 80_000_000),
            # What comes out of an images endpoint is pictures.
            ({"input_tokens": 10, "output_tokens": 2_000}, 10 * 300 + 2_000 * 30_000),
        ],
    )
    async def test_where_a_price_knows_pieces_and_tokens_the_pictures_are_paid_for(
        self, place: Place, provider: FakeProvider, tenant: Tenant, usage: dict[str, int], cost: int
    ) -> None:
        provider.scripts.append(answer(pictures(2, usage=usage)))
        await call(place.port, post(IMAGES, tenant.key, asked(model="draw-by-both", n=2)))
        entry = await place.entry(tenant)
        assert (entry["cost_nano_usd"], entry["quality"]) == (cost, "exact")

    async def test_no_pictures_cost_nothing(self, place: Place, provider: FakeProvider, tenant: Tenant) -> None:
        provider.scripts.append(answer(pictures(0)))
        await call(place.port, post(IMAGES, tenant.key, asked(model="draw", n=4)))
        entry = await place.entry(tenant)
        assert (entry["images"], entry["quality"], entry["cost_nano_usd"]) == (0, "exact", 0)

    async def test_a_cost_without_counts_stands_beside_the_pictures(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(answer(pictures(1, usage={"cost_in_usd_ticks": 200_000_000})))
        await call(place.port, post(IMAGES, tenant.key, asked(model="draw")))
        entry = await place.entry(tenant)
        assert (entry["images"], entry["reported_cost_nano_usd"]) == (1, 20_000_000)

    @pytest.mark.parametrize("bytes_large", [4_000, 400_000, 2_000_000])
    @pytest.mark.parametrize("is_usage_first", [False, True])
    async def test_a_streamed_picture_says_what_it_took_however_large_it_is(
        self, place: Place, provider: FakeProvider, tenant: Tenant, bytes_large: int, *, is_usage_first: bool
    ) -> None:
        picture = {"b64_json": "A" * bytes_large}
        usage = {"usage": {"input_tokens": 10, "output_tokens": 4_000, "total_tokens": 4_010}}
        event = {"type": "image_generation.completed", **(usage | picture if is_usage_first else picture | usage)}
        provider.scripts.append(events(event))
        got = await call(place.port, post(IMAGES, tenant.key, asked(model="draw-by-tokens", stream=True)))
        assert got.body == b"data: " + msgspec.json.encode(event) + b"\n\ndata: [DONE]\n\n"
        entry = await place.entry(tenant)
        assert (entry["cost_nano_usd"], entry["quality"], entry["images"]) == (4_010_000, "exact", 0)

    @pytest.mark.parametrize("usage", [{}, {"usage": {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}}])
    async def test_a_streamed_picture_that_says_nothing_is_the_one_asked_for(
        self, place: Place, provider: FakeProvider, tenant: Tenant, usage: dict[str, object]
    ) -> None:
        provider.scripts.append(events({"type": "image_generation.completed", "b64_json": "A", **usage}))
        assert (await call(place.port, post(IMAGES, tenant.key, asked(model="draw", stream=True)))).status == 200
        entry = await place.entry(tenant)
        assert (entry["images"], entry["quality"], entry["cost_nano_usd"]) == (1, "estimated", 40_000_000)

    async def test_a_refused_call_takes_no_picture(self, place: Place, provider: FakeProvider, tenant: Tenant) -> None:
        provider.scripts.append(answer(b'{"error": {"message": "no", "type": "invalid_request_error"}}', 400))
        await call(place.port, post(IMAGES, tenant.key, asked(model="draw")))
        entry = await place.entry(tenant)
        assert (entry["images"], entry["cost_nano_usd"], entry["is_unpriced"]) == (0, 0, False)


class TestRecordings:
    async def test_text_is_asked_for_as_json_which_says_how_long_the_recording_is(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        said = {"text": 'Grüße, "you".', "usage": {"type": "duration", "seconds": 7}}
        provider.scripts.append(answer(msgspec.json.encode(said)))
        got = await call(place.port, transcribe(tenant, recording(model="hear", response_format="text")))
        assert got.body.decode() == 'Grüße, "you".\n'
        assert got.headers["content-type"].startswith("text/plain")
        assert got.headers["x-request-cost-usd"] == "0.0007"
        sent = [("model", None, b"hear"), ("response_format", None, b"json"), ("file", "a.mp3", b"x" * 100)]
        assert sent_form(provider.received[-1]) == sent
        entry = await place.entry(tenant)
        assert (entry["audio_seconds"], entry["quality"]) == (7, "exact")

    async def test_a_provider_that_gives_text_all_the_same_is_estimated_by_the_recordings_size(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        provider.scripts.append(answer(b"plain words\n", content_type="text/plain"))
        form = recording(model="hear", response_format="text", bytes_long=160_000)
        got = await call(place.port, transcribe(tenant, form))
        assert got.body == b"plain words\n"
        entry = await place.entry(tenant)
        assert (entry["audio_seconds"], entry["quality"], entry["is_unpriced"]) == (11, "estimated", False)

    @pytest.mark.parametrize(
        ("form", "body"),
        [
            ("srt", "1\n00:00:00,000 --> 00:00:04,100\nHello\n\n2\n00:00:04,100 --> 01:01:01,001\nyou\n\n"),
            ("vtt", "WEBVTT\n\n00:00.000 --> 00:04.100\nHello\n\n00:04.100 --> 01:01:01.500\nyou\n\n"),
        ],
    )
    async def test_subtitles_are_billed_to_the_end_of_their_last_cue(
        self, place: Place, provider: FakeProvider, tenant: Tenant, form: str, body: str
    ) -> None:
        provider.scripts.append(answer(body.encode(), content_type="text/plain"))
        got = await call(place.port, transcribe(tenant, recording(model="hear", response_format=form)))
        assert got.body == body.encode()
        entry = await place.entry(tenant)
        assert (entry["audio_seconds"], entry["quality"]) == (3_662, "estimated")

    @pytest.mark.parametrize(
        ("body", "content_type", "seconds"),
        [
            # A cue that ends at once: the recording has a length all the same.
            (b"1\n00:00:00,000 --> 00:00:00,000\nHello\n", "text/plain", 8),
            # What is no time of a recording is none.
            (b"1\n00:00:00,000 --> 99999999999:00:00,000\nHello\n", "text/plain", 101),
            (b"1\n00:00:00,000 --> " + b"9" * 5_000 + b":00:00,000\nHello\n", "text/plain", 101),
            # Words are no cues.
            (b'{"text": "it says --> 00:00:00,000"}', "application/json", 101),
            (b'{"text": "hi", "duration": "8.4s"}', "application/json", 101),
            (b'{"text": "hi", "duration": -5}', "application/json", 101),
            (b'{"text": "hi", "duration": 0}', "application/json", 101),
            # Tokens, of which a price by the second knows nothing.
            (
                b'{"text": "hi", "usage": {"input_tokens": 10, "output_tokens": 2, "total_tokens": 12}}',
                "application/json",
                101,
            ),
        ],
    )
    async def test_what_an_answer_says_amiss_makes_no_call_free(
        self, place: Place, provider: FakeProvider, tenant: Tenant, body: bytes, content_type: str, seconds: int
    ) -> None:
        provider.scripts.append(answer(body, content_type=content_type))
        form = recording(model="hear", response_format="srt", bytes_long=1_600_000)
        assert (await call(place.port, transcribe(tenant, form))).body == body
        entry = await place.entry(tenant)
        assert (entry["audio_seconds"], entry["quality"], entry["is_unpriced"]) == (seconds, "estimated", False)

    async def test_a_model_that_cannot_stream_gives_text_as_it_was_asked_for(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        said = {"text": "hi", "usage": {"type": "duration", "seconds": 90}}
        provider.scripts.append(answer(msgspec.json.encode(said)))
        form = recording(model="hear", response_format="text", stream="true")
        assert (await call(place.port, transcribe(tenant, form))).body == b"hi\n"
        entry = await place.entry(tenant)
        assert (entry["audio_seconds"], entry["quality"]) == (90, "exact")

    async def test_a_file_cannot_stop_the_process(self, place: Place, provider: FakeProvider, tenant: Tenant) -> None:
        """Guarantee: whatever a recording holds, others are answered meanwhile."""
        provider.scripts.append(answer(b'{"text": "hi", "usage": {"type": "duration", "seconds": 1}}'))
        bait = b"content-disposition:;name=response_format" * 50_000
        form = recording(model="hear", response_format="text")
        form = form.replace(b"x" * 100, bait)
        got = await asyncio.wait_for(call(place.port, transcribe(tenant, form)), 30)
        assert got.body == b"hi\n"

    @pytest.mark.parametrize("duration", [8.4, "8.4"])
    async def test_the_verbose_form_says_how_long_the_recording_is(
        self, place: Place, provider: FakeProvider, tenant: Tenant, duration: object
    ) -> None:
        verbose = {"task": "transcribe", "duration": duration, "text": "hi", "segments": []}
        provider.scripts.append(answer(msgspec.json.encode(verbose)))
        got = await call(place.port, transcribe(tenant, recording(model="hear", response_format="verbose_json")))
        assert got.json() == verbose
        entry = await place.entry(tenant)
        assert (entry["audio_seconds"], entry["quality"]) == (9, "exact")

    async def test_a_recording_that_is_priced_by_tokens_is_unpriced_where_nobody_reports_them(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        """Guarantee: never free; `aap prices missing` names it."""
        provider.scripts.append(answer(b'{"text": "hi"}'))
        form = recording(model="hear-by-tokens", bytes_long=1_600_000)
        await call(place.port, transcribe(tenant, form))
        entry = await place.entry(tenant)
        assert (entry["audio_seconds"], entry["is_unpriced"], entry["quality"]) == (101, True, "estimated")

    async def test_seconds_that_are_reported_before_a_stream_breaks_off_stay_seconds(
        self, place: Place, provider: FakeProvider, tenant: Tenant
    ) -> None:
        async def broken(exchange: Exchange) -> None:
            await exchange.send_head()
            done = {"type": "transcript.text.done", "usage": {"type": "duration", "seconds": 7}}
            for event in ({"type": "transcript.text.delta"}, done, {"type": "x"}):
                await exchange.send_chunk(b"data: " + msgspec.json.encode(event) + b"\n\n")
            exchange.reset()

        provider.scripts.append(broken)
        await call(place.port, transcribe(tenant, recording(model="hear", stream="true")))
        entry = await place.entry(tenant)
        assert (entry["audio_seconds"], entry["output_tokens"], entry["quality"]) == (7, 0, "estimated")

    async def test_two_formats_are_one_too_many(self, place: Place, tenant: Tenant) -> None:
        """Guarantee: what is asked for is what the provider reads, whichever of two it would take."""
        once = recording(model="hear", response_format="text")
        part = b'--b\r\nContent-Disposition: form-data; name="response_format"\r\n\r\njson\r\n'
        assert (await call(place.port, transcribe(tenant, part + once))).status == 400


async def test_who_was_read_before_it_was_refused_may_be_billed(
    place: Place, provider: FakeProvider, tenant: Tenant
) -> None:
    """Guarantee: a refusal of the second attempt does not undo what the first one sent."""

    async def lost(exchange: Exchange) -> None:
        exchange.reset()

    # A connection that was used before may have been closed meanwhile: what is lost on it is sent again at once.
    provider.scripts.extend([lost, lost, answer(b'{"error": {"message": "no", "type": "invalid_request_error"}}', 400)])
    got = await call(place.port, post("/v1/embeddings", tenant.key, b'{"model": "embed", "input": "abcdefgh"}'))
    assert got.status == 400
    entry = await place.entry(tenant)
    assert entry["input_tokens"] > 1
    assert (entry["quality"], entry["status"]) == ("estimated", 400)


async def test_a_usage_without_a_count_is_none(place: Place, provider: FakeProvider, tenant: Tenant) -> None:
    provider.scripts.append(answer(b'{"object": "list", "data": [], "usage": {}}'))
    await call(place.port, post("/v1/embeddings", tenant.key, b'{"model": "embed", "input": "abcdefgh"}'))
    entry = await place.entry(tenant)
    assert entry["input_tokens"] > 1
    assert entry["quality"] == "estimated"


async def test_vectors_are_no_tokens(place: Place, provider: FakeProvider, tenant: Tenant) -> None:
    """Guarantee: embeddings whose provider reports nothing are billed their input."""
    vectors = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.125] * 1_000}]}
    provider.scripts.append(answer(msgspec.json.encode(vectors)))
    await call(
        place.port, post("/v1/embeddings", tenant.key, msgspec.json.encode({"model": "embed", "input": "x" * 400}))
    )
    entry = await place.entry(tenant)
    assert entry["input_tokens"] > 100
    assert (entry["output_tokens"], entry["quality"]) == (0, "estimated")
