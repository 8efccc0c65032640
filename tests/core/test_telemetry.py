"""Logs: a planted key comes out nowhere, however it is wrapped."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest
import structlog

from core.settings import LogSettings
from core.telemetry import configure_logs
from keys.secrets import hint, mint, redact
from tests.harness.eventually import eventually

KEY = mint().text


class Holder(msgspec.Struct):
    value: object


class Pair(NamedTuple):
    name: str
    value: object


@pytest.fixture(params=["json", "console"])
def written(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    handlers, level = logging.root.handlers[:], logging.root.level
    stream = io.StringIO()
    configure_logs(LogSettings(format=request.param, level="debug", requests=True), redact, stream=stream)
    yield stream
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


async def lines(written: io.StringIO) -> str:
    return await eventually(written.getvalue)


@pytest.mark.parametrize(
    "value",
    [
        KEY,
        f"Bearer {KEY}",
        KEY.encode(),
        bytearray(KEY.encode()),
        [KEY],
        (1, (KEY,)),
        {KEY},
        frozenset({KEY.encode()}),
        {"a": {"b": [{"c": KEY}]}},
        {KEY: 1},
        {"a": {KEY: {KEY: 1}}},
        {("x", KEY): 1},
        Holder([KEY]),
        Pair("x", KEY),
        ValueError(KEY),
        [ValueError({"x": KEY})],
        f"x{KEY}x",
        f"{KEY}{KEY}",
    ],
    ids=lambda value: type(value).__name__,
)
async def test_a_key_never_comes_out(written: io.StringIO, value: Any) -> None:
    structlog.get_logger().info("thing.happened", field=value)
    text = await lines(written)
    assert "thing.happened" in text
    assert KEY not in text
    assert KEY[20:50] not in text
    assert hint(KEY) in text


async def test_neither_in_the_event_nor_in_an_exception_and_its_causes(written: io.StringIO) -> None:
    log = structlog.get_logger()
    error = ValueError(f"with {KEY}")
    error.add_note(f"note {KEY}")
    error.__cause__ = KeyError(KEY)
    log.error("it.broke", exc_info=error)
    log.warning("event %s", KEY)
    text = await lines(written)
    assert "it.broke" in text
    assert KEY[20:50] not in text


async def test_what_libraries_log_is_scrubbed_and_shaped_like_the_rest(written: io.StringIO) -> None:
    logging.getLogger("some.library").warning("refused %s", KEY, extra={"more": KEY})
    logging.getLogger("some.library").error("failed", exc_info=OSError(KEY))
    logging.getLogger("some.library").info("not shown")
    text = await lines(written)
    assert "library.logged" in text
    assert "some.library" in text
    assert "not shown" not in text
    assert KEY[20:50] not in text


@pytest.mark.parametrize(
    "name", ["Authorization", "api_key", "X-API-Key", "password", "client_secret", "peppers", "Set-Cookie"]
)
async def test_a_field_named_like_a_secret_shows_nothing_whatever_it_holds(written: io.StringIO, name: str) -> None:
    structlog.get_logger().info(
        "thing.happened", headers={name: "planted", "x": {name: ["planted"]}}, **{name: b"planted"}
    )
    text = await lines(written)
    assert "planted" not in text
    assert text.count("[redacted]") == 3


async def test_numbers_and_nothing_stay_what_they_are() -> None:
    handlers, level = logging.root.handlers[:], logging.root.level
    stream = io.StringIO()
    configure_logs(LogSettings(format="json", level="warning", requests=True), redact, stream=stream)
    structlog.get_logger().info("below.level")
    structlog.get_logger().warning("thing.happened", count=5, share=0.5, is_on=True, none=None, nested={"n": 1})
    line = msgspec.json.decode(await lines(stream))
    structlog.reset_defaults()
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    assert {name: line[name] for name in ("event", "level", "count", "share", "is_on", "none", "nested")} == {
        "event": "thing.happened",
        "level": "warning",
        "count": 5,
        "share": 0.5,
        "is_on": True,
        "none": None,
        "nested": {"n": 1},
    }


def test_a_scrubber_that_does_not_scrub_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guarantee: the self-test of the redaction runs at every start, and is able to fail."""
    monkeypatch.setattr("core.telemetry._SECRET_NAMES", ())
    with pytest.raises(RuntimeError):
        configure_logs(LogSettings(format="json", level="info", requests=True), redact, stream=io.StringIO())
