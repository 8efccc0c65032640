"""The built-in demo model: it echoes, says that it does, and needs no provider. For the first call on a new machine.

Deterministic: the same request gets the same words, vectors and tool calls.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import time
from collections.abc import AsyncIterator
from typing import Any, Final, cast

import msgspec

from core.ids import new_id
from inference.upstreams.base import EVENT_STREAM, Answer, GeneratedAnswer, HeldAnswer, UpstreamCall
from inference.wire import JSON

_LABEL: Final = "[demo model: no provider is configured] You said: "
_DIMENSIONS: Final = 256
_EXAMPLES: Final[dict[str, Any]] = {
    "string": "demo",
    "integer": 1,
    "number": 1.0,
    "boolean": True,
    "array": [],
    "null": None,
}
_Table = dict[str, Any]
_encode: Final = msgspec.json.Encoder().encode


class Demo:
    """Answers chat, completions and embeddings out of thin air."""

    async def open(self, call: UpstreamCall) -> Answer:
        """Return the answer; other endpoints get a clear 400."""
        await call.permit
        request = call.request.decoded()
        path = call.endpoint.path
        if path == "/embeddings":
            return _json(200, _embeddings(request, call.deployment.model))
        if path not in {"/chat/completions", "/completions"}:
            return _json(400, _unsupported(path))
        reply = _Reply(request, call.deployment.model, is_chat=path == "/chat/completions")
        if call.request.is_stream:
            return GeneratedAnswer(200, EVENT_STREAM, _events(reply), call.deployment.deadlines)
        return _json(200, reply.whole())

    async def close(self) -> None:
        """Nothing is open."""


class _Reply:
    """One answer, as a whole or in chunks."""

    def __init__(self, request: dict[str, Any], model: str, *, is_chat: bool) -> None:
        self.is_chat = is_chat
        self.id = new_id("chatcmpl" if is_chat else "cmpl").replace("_", "-", 1)
        self.created = int(time.time())
        self.model = model
        said = _last_words(request) if is_chat else _text_of(request.get("prompt"))
        self.tool_calls = _tool_calls(request) if is_chat else []
        self.words = [] if self.tool_calls else [word + " " for word in (_LABEL + said).split()] or [_LABEL]
        prompt_tokens = max(1, len(_encode(request.get("messages", request.get("prompt")))) // 4)
        completion_tokens = max(1, len(self.words) + sum(len(_encode(call)) // 4 for call in self.tool_calls))
        self.usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    @property
    def finish_reason(self) -> str:
        return "tool_calls" if self.tool_calls else "stop"

    def whole(self) -> dict[str, Any]:
        text = "".join(self.words).rstrip()
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish_reason, "logprobs": None}
        if self.is_chat:
            message: _Table = {"role": "assistant", "content": None if self.tool_calls else text, "refusal": None}
            if self.tool_calls:
                message["tool_calls"] = self.tool_calls
            choice["message"] = message
        else:
            choice["text"] = text
        return self._envelope("", [choice]) | {"usage": self.usage}

    def chunks(self) -> list[dict[str, Any]]:
        if not self.is_chat:
            pieces = [{"index": 0, "text": word, "logprobs": None, "finish_reason": None} for word in self.words]
            ends = {"index": 0, "text": "", "logprobs": None, "finish_reason": self.finish_reason}
            return [self._chunk([choice]) for choice in (*pieces, ends)]
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": "", "refusal": None}]
        deltas += [{"content": word} for word in self.words]
        deltas += [{"tool_calls": [{"index": at, **call}]} for at, call in enumerate(self.tool_calls)]
        choices: list[_Table] = [
            {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas
        ]
        choices.append({"index": 0, "delta": {}, "logprobs": None, "finish_reason": self.finish_reason})
        return [self._chunk([choice]) for choice in choices]

    def usage_chunk(self) -> dict[str, Any]:
        return self._chunk([]) | {"usage": self.usage}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        # Every stream is asked for usage on its way here, and OpenAI then says null on each chunk before the last.
        return self._envelope(".chunk" if self.is_chat else "", choices) | {"usage": None}

    def _envelope(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {
            "id": self.id,
            "object": kind + suffix,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }


async def _events(reply: _Reply) -> AsyncIterator[bytes]:
    for chunk in [*reply.chunks(), reply.usage_chunk()]:
        yield b"data: " + _encode(chunk) + b"\n\n"
    yield b"data: [DONE]\n\n"


def _json(status: int, body: dict[str, Any]) -> HeldAnswer:
    return HeldAnswer(status, ((b"content-type", JSON),), _encode(body))


def _unsupported(path: str) -> dict[str, Any]:
    message = f"The demo model does not answer {path}. Configure a provider."
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": "unsupported"}}


def _last_words(request: _Table) -> str:
    messages = _list(request.get("messages"))
    return _text_of(_table(messages[-1]).get("content")) if messages else ""


def _text_of(content: object) -> str:
    if isinstance(content, str):
        return content
    parts = [part if isinstance(part, str) else _table(part).get("text") for part in _list(content)]
    return " ".join(part for part in parts if isinstance(part, str))


def _tool_calls(request: _Table) -> list[_Table]:
    """Call every tool once, with placeholder arguments, unless the last message already answers a call."""
    messages = _list(request.get("messages"))
    if request.get("tool_choice") == "none" or (messages and _table(messages[-1]).get("role") == "tool"):
        return []
    functions = [_table(_table(tool).get("function")) for tool in _list(request.get("tools"))]
    return [
        {
            "id": f"call_demo{at}",
            "type": "function",
            "function": {
                "name": function.get("name"),
                "arguments": _encode(_example(function.get("parameters"))).decode(),
            },
        }
        for at, function in enumerate(functions)
    ]


def _example(given: object) -> Any:
    """Return a small value that fits a JSON schema."""
    schema = _table(given)
    choices = _list(schema.get("enum"))
    kind = str(schema.get("type"))
    if choices:
        return choices[0]
    if kind in _EXAMPLES:
        return _EXAMPLES[kind]
    return {name: _example(part) for name, part in _table(schema.get("properties")).items()}


def _table(value: object) -> _Table:
    return cast("_Table", value) if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _embeddings(request: _Table, model: str) -> _Table:
    given = request.get("input")
    # One text, or one list of token numbers, is one input.
    several = _list(given)
    inputs: list[Any] = [given] if all(isinstance(item, int) for item in several) else several
    vectors = [_vector(_encode(item), request.get("dimensions")) for item in inputs]
    is_base64 = request.get("encoding_format") == "base64"
    tokens = max(1, len(_encode(given)) // 4)
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": at, "embedding": _packed(vector) if is_base64 else vector}
            for at, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _vector(text: bytes, dimensions: object) -> list[float]:
    """Return a unit vector drawn from the text's hash: equal texts are equal, others are nearly orthogonal."""
    count = dimensions if isinstance(dimensions, int) and 1 <= dimensions <= 4096 else _DIMENSIONS
    noise = hashlib.shake_256(text).digest(count * 2)
    values = [(number - 32_767.5) / 32_767.5 for number in struct.unpack(f"<{count}H", noise)]
    length = sum(value * value for value in values) ** 0.5 or 1.0
    # Rounded to what a float32 holds, so that both encodings carry the same numbers.
    return [struct.unpack("<f", struct.pack("<f", value / length))[0] for value in values]


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
