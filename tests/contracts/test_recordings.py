"""Every recording of OpenAI's API, replayed by a fake provider, comes out of the gateway as it went in."""

from __future__ import annotations

import msgspec
import pytest

from tests.contracts.recordings import DIRECTORY, Recording, load
from tests.harness.gateway import Gateway
from tests.harness.provider import Exchange, FakeProvider, Script, answer
from tests.harness.raw import RawConnection, post
from tests.harness.tenant import Tenant

RECORDINGS = load()
BOUNDARY = "recorded"
# The recorder left the form out; any form that names the model will do, since what is compared is the answer.
FORM = (
    f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
    f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="a.wav"\r\n\r\n\x00\x01RIFF\r\n'
    f"--{BOUNDARY}--\r\n"
).encode()


def played(recording: Recording, cut: int | None = None) -> Script:
    if not recording.response_content_type.startswith("text/event-stream"):
        return answer(recording.response_body, recording.status, recording.response_content_type)

    async def play(exchange: Exchange) -> None:
        await exchange.send_head(recording.status, recording.response_content_type)
        body = recording.response_body
        step = cut or len(body)
        for at in range(0, len(body), step):
            await exchange.send_chunk(body[at : at + step])
        await exchange.end()

    return play


def request_of(recording: Recording, tenant: Tenant) -> bytes:
    if recording.content_type.startswith("multipart/"):
        return post(recording.path, tenant.key, FORM, content_type=f"multipart/form-data; boundary={BOUNDARY}")
    return post(recording.path, tenant.key, recording.request_body)


def expected_body(recording: Recording) -> bytes:
    """The recorded body. No recording shows usage to a caller who had not asked for it, so none loses a chunk."""
    return recording.response_body


def test_every_file_is_replayed() -> None:
    assert len(RECORDINGS) == len(list(DIRECTORY.glob("*.yaml"))) == 20


@pytest.mark.parametrize("recording", RECORDINGS, ids=lambda recording: recording.name)
async def test_a_recording_comes_back_byte_for_byte(
    recording: Recording, gateway: Gateway, provider: FakeProvider, tenant: Tenant
) -> None:
    """Guarantee: status and body are the provider's own, streams included."""
    provider.scripts.append(played(recording))
    connection = await RawConnection.open(gateway.port)
    await connection.send(request_of(recording, tenant))
    got = await connection.answer()
    connection.close()
    assert got.status == recording.status
    assert got.body == expected_body(recording)
    assert got.headers["content-type"] == recording.response_content_type.lower()
    assert provider.received[-1].path == recording.path


@pytest.mark.parametrize("cut", [1, 7, 64])
@pytest.mark.parametrize("recording", [r for r in RECORDINGS if "streaming" in r.name], ids=lambda r: r.name)
async def test_a_recorded_stream_survives_any_chunking(
    recording: Recording, cut: int, gateway: Gateway, provider: FakeProvider, tenant: Tenant
) -> None:
    provider.scripts.append(played(recording, cut))
    connection = await RawConnection.open(gateway.port)
    await connection.send(request_of(recording, tenant))
    got = await connection.answer()
    connection.close()
    assert got.body == expected_body(recording)


async def test_the_recorded_request_reaches_the_provider_unchanged(
    gateway: Gateway, provider: FakeProvider, tenant: Tenant
) -> None:
    for recording in RECORDINGS:
        if recording.content_type == "application/json":
            provider.scripts.append(played(recording))
            connection = await RawConnection.open(gateway.port)
            await connection.send(request_of(recording, tenant))
            await connection.answer()
            connection.close()
            sent, asked = provider.received[-1].json(), msgspec.json.decode(recording.request_body)
            if asked.get("stream"):
                asked["stream_options"] = {"include_usage": True}
            assert sent == asked
