"""The bytes that the mock provider answers with, built once per model name and kept.

A model name is a small script, so that any gateway in between can choose the answer by configuration alone:

    mock                   63 events, as fast as possible
    mock-200               200 events, as fast as possible
    mock-paced-40          40 events/s, 120 of them
    mock-paced-40x200      40 events/s, 200 of them
    mock-status-503        an error answer with that status
    mock-cut               a stream that ends after half of its events, without [DONE]

An event is a `data:` line with a choice in it: the role chunk, the content chunks and the finish chunk. The usage chunk
and [DONE] come on top.
"""

import base64
import functools
import re
import struct

import msgspec

EVENTS_DEFAULT = 63
PACED_EVENTS_DEFAULT = 120
EVENTS_MAX = 100_000
ANSWER_WORDS = 60  # gives an answer of about 700 bytes, the size that performance.md measured with
CREATED = 1_760_000_000
PROMPT_TOKENS = 180
EMBEDDING_DIMENSIONS = 256
_SCRIPT = re.compile(
    r"mock(?:-(?P<events>\d+)|-paced-(?P<rate>\d+)(?:x(?P<paced>\d+))?|-status-(?P<status>\d{3})|-(?P<cut>cut))?"
)
_REASONS = {400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests", 500: "Server Error"}


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What one model name asks for. A rate of 0 means: everything at once."""

    events: int = EVENTS_DEFAULT
    events_per_second: int = 0
    status: int = 200
    is_cut: bool = False


@functools.lru_cache(maxsize=256)
def script_of(model: str) -> Script | None:
    """Read a model name as a script; None for a model that the mock does not have."""
    match = _SCRIPT.fullmatch(model)
    if match is None:
        return None
    if match["rate"]:
        events = int(match["paced"] or PACED_EVENTS_DEFAULT)
        return Script(events=_bounded(events), events_per_second=max(1, min(1000, int(match["rate"]))))
    if match["status"]:
        return Script(status=int(match["status"]))
    return Script(events=_bounded(int(match["events"] or EVENTS_DEFAULT)), is_cut=bool(match["cut"]))


def _bounded(events: int) -> int:
    return max(2, min(EVENTS_MAX, events))


def json_answer(status: int, body: object) -> bytes:
    """Frame one JSON answer with its length."""
    text = msgspec.json.encode(body)
    head = (
        f"HTTP/1.1 {status} {_REASONS.get(status, 'OK' if status == 200 else 'Error')}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(text)}\r\nx-request-id: req_mock\r\n\r\n"
    )
    return head.encode() + text


def error_answer(status: int, message: str) -> bytes:
    """Frame one error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return json_answer(status, {"error": {"message": message, "type": kind, "param": None, "code": None}})


@functools.lru_cache(maxsize=256)
def completion_answer(model: str) -> bytes:
    """Frame one whole chat completion of about 700 bytes, or the error that the script asks for."""
    script = script_of(model)
    if script is None:
        return error_answer(404, f"The model `{model}` does not exist.")
    if script.status != 200:
        return error_answer(script.status, f"The script asked for status {script.status}.")
    message = {"role": "assistant", "content": " ".join(["word"] * ANSWER_WORDS), "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return json_answer(200, {**_envelope(model, "chat.completion"), "choices": [choice], "usage": _usage(ANSWER_WORDS)})


@functools.lru_cache(maxsize=256)
def stream_writes(model: str, *, with_usage: bool) -> tuple[bytes, ...]:
    """List the writes of one stream, each an HTTP chunk: headers and role first; finish, usage and [DONE] in the last.

    A script without a rate is a single write. A cut stream lacks its second half and the end of the chunked body.
    """
    script = script_of(model)
    if script is None or script.status != 200:
        return (completion_answer(model),)
    deltas = [{"role": "assistant", "content": ""}, *({"content": "word "} for _ in range(script.events - 2))]
    frames = [_frame(model, _choice(delta, None), with_usage=with_usage) for delta in deltas]
    frames[0] = _STREAM_HEAD + frames[0]
    if script.is_cut:
        return (b"".join(frames[: script.events // 2]),)
    last = _frame(model, _choice({}, "stop"), with_usage=with_usage)
    if with_usage:
        last += _chunk({**_envelope(model, "chat.completion.chunk"), "choices": [], "usage": _usage(script.events)})
    frames.append(last + _http_chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
    return tuple(frames) if script.events_per_second else (b"".join(frames),)


_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"x-request-id: req_mock\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _frame(model: str, choice: dict, *, with_usage: bool) -> bytes:
    usage = {"usage": None} if with_usage else {}  # OpenAI sends the null on every chunk once usage was asked for
    return _chunk({**_envelope(model, "chat.completion.chunk"), "choices": [choice], **usage})


def _choice(delta: dict, finish_reason: str | None) -> dict:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def _chunk(body: dict) -> bytes:
    return _http_chunk(b"data: " + msgspec.json.encode(body) + b"\n\n")


def _http_chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


def _envelope(model: str, kind: str) -> dict:
    return {"id": "chatcmpl-mock0123456789abcdef", "object": kind, "created": CREATED, "model": model}


def _usage(completion_tokens: int) -> dict:
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": completion_tokens,
        "total_tokens": PROMPT_TOKENS + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


@functools.lru_cache(maxsize=256)
def embeddings_answer(model: str, inputs: int, encoding: str) -> bytes:
    """Frame one embeddings list; base64 is what the official client asks for by default."""
    vector = [0.5 / (index + 1) for index in range(EMBEDDING_DIMENSIONS)]
    value = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if encoding == "base64" else vector
    rows = [{"object": "embedding", "index": index, "embedding": value} for index in range(inputs)]
    usage = {"prompt_tokens": 8 * inputs, "total_tokens": 8 * inputs}
    return json_answer(200, {"object": "list", "data": rows, "model": model, "usage": usage})


@functools.cache
def models_answer() -> bytes:
    """Frame the list of models: one name per kind of script."""
    names = ("mock", "mock-paced-40", "mock-status-500", "mock-cut", "mock-embedding")
    rows = [{"id": name, "object": "model", "created": CREATED, "owned_by": "bench"} for name in names]
    return json_answer(200, {"object": "list", "data": rows})
