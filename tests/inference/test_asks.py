"""The bound of a call under a hard budget: nothing that a provider reads may be left out of it."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from inference.asks import ask_of
from inference.catalog import Model
from inference.endpoints import ENDPOINTS, Endpoint
from inference.wire import parse
from metering.rating import Ask

CHAT: Endpoint = next(one for one in ENDPOINTS if one.path.endswith("/chat/completions"))
MODEL = Model(name="m", deployments=(), output_tokens_max=1_000, created=0, owned_by="x")


def asked(body: dict[str, Any] | bytes) -> Ask | None:
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    return ask_of(CHAT, parse(CHAT, b"application/json", raw, 1_000), MODEL)


def with_part(part: bytes) -> bytes:
    return b'{"model":"m","messages":[{"role":"user","content":[%b]}]}' % part


def test_a_picture_counts_however_its_name_is_spelt() -> None:
    plain = asked(with_part(b'{"type":"image_url","image_url":{"url":"https://x/y.png"}}'))
    escaped = asked(with_part(rb'{"type":"image_url","image\u005furl":{"url":"https://x/y.png"}}'))
    none = asked(with_part(b'{"type":"text","text":"hello"}'))
    assert plain is not None
    assert escaped is not None
    assert none is not None
    assert none.input_tokens_max < 50_000 < plain.input_tokens_max <= escaped.input_tokens_max


@pytest.mark.parametrize(
    "part",
    [
        b'{"type":"file","file":{"file_id":"f"}}',
        rb'{"type":"file","file":{"file\u005fid":"f"}}',
        b'{"type":"file","file":{"file_data":"data:application/pdf;base64,AAAA"}}',
        b'{"type":"video_url","video_url":{"url":"https://x/y.mp4"}}',
    ],
)
def test_what_is_read_from_elsewhere_has_no_bound(part: bytes) -> None:
    assert asked(with_part(part)) is None


@pytest.mark.parametrize(
    ("tools", "is_bounded"),
    [
        ([{"type": "function", "function": {"name": "f"}}], True),
        ([{"type": "custom", "custom": {"name": "f"}}], True),
        ([], True),
        (None, True),
        ([{"type": "web_search"}], False),
        ([{"type": "function"}, {"type": "code_interpreter"}], False),
        (["x"], False),
        ({"type": "function"}, False),
    ],
)
def test_tools_that_the_provider_runs_have_no_bound(tools: Any, is_bounded: bool) -> None:
    found = asked({"model": "m", "messages": [], "tools": tools})
    assert (found is not None) is is_bounded
