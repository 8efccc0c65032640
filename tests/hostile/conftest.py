"""A gateway for hostile callers, and what every one of their requests must end in."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator

import msgspec
import pytest

from tests.harness.gateway import Gateway, config_for
from tests.harness.provider import FakeProvider
from tests.harness.raw import RawAnswer, RawConnection
from tests.harness.stores import TestStores

PATH = "/v1/chat/completions"
_SILENCE_SECONDS = 0.2
BODY_BYTES_MAX = 10 * 1024 * 1024


@pytest.fixture(scope="session")
async def gateway(
    stores: TestStores, shared_provider: FakeProvider, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gateway]:
    directory = tmp_path_factory.mktemp("hostile")
    config = config_for(shared_provider.base_url, models=("fake", "org/fake"))
    async with Gateway(stores, directory, config, AAP_HEADER_SECONDS_MAX="1") as made:
        yield made
        assert '"call.broke"' not in made.log
        assert '"request.broke"' not in made.log


async def spoken(port: int, data: bytes) -> bytes:
    """Send *data*; return all that the gateway says until it closes, or falls silent with a request half read."""
    connection = await RawConnection.open(port)
    said = b""
    try:
        connection.writer.write(data)
        while piece := await asyncio.wait_for(connection.reader.read(65_536), _SILENCE_SECONDS if said else 1.5):
            said += piece
    except (ConnectionError, TimeoutError):
        pass
    finally:
        connection.reset()
    return said


def statuses(said: bytes) -> list[int]:
    """The status of every answer in *said*, in order; an interim `100 Continue` is none."""
    # Anywhere: an answer begins where the body before it ends, which need not be a line's end.
    found = re.findall(rb"HTTP/1\.[01] (\d{3}) ", said)
    return [int(status) for status in found if status != b"100"]


def assert_clear_error(got: RawAnswer) -> dict[str, object]:
    """A 4xx in OpenAI's exact form, with a request id. Return the error."""
    assert 400 <= got.status < 500, got
    assert got.headers["content-type"] == "application/json"
    assert got.headers["x-request-id"].startswith("req_")
    error = got.error()
    assert isinstance(error["message"], str)
    assert error["type"] in {"invalid_request_error", "requests", "tokens"}
    msgspec.json.encode(error)
    return error
