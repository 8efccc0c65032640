"""What we read of a request; everything else passes through as it came.

A JSON body is taken apart at its top level only. What goes upstream is put together again from those parts, never the
caller's bytes: a body with two `model` keys must not be read one way here and another way there.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from inference.endpoints import Endpoint
from inference.errors import BodyInvalid
from inference.forms import boundary_of, with_values
from inference.tokens import (
    count_choices,
    estimate_audio_seconds,
    estimate_output_tokens,
    estimate_prompt_tokens,
)
from metering.usage import NO_MEDIA, Media

Fields = dict[str, msgspec.Raw]
_T = TypeVar("_T")
_fields: Final = msgspec.json.Decoder(Fields)
_text: Final = msgspec.json.Decoder(str)
_flag: Final = msgspec.json.Decoder(bool | None)
_encode: Final = msgspec.json.Encoder().encode
_MODEL_LENGTH_MAX: Final = 256
JSON: Final = b"application/json"
_USAGE_ASKED: Final = msgspec.Raw(b'{"include_usage":true}')


class StreamOptions(msgspec.Struct, frozen=True):
    """The part of `stream_options` that concerns us."""

    include_usage: bool | None = None
    include_cost: bool | None = None
    """Ours, and not the provider's business: the last chunk says what the call is charged."""


_stream_options: Final = msgspec.json.Decoder(StreamOptions | None)


class ParsedRequest(msgspec.Struct, frozen=True):
    """A request as far as we understand it. `repr` does not show it: it holds people's words."""

    fields: Fields | None
    """The top level of a JSON body; None for a form."""
    body: bytes
    """The body as it came."""
    content_type: bytes
    """The media type of `upstream_body`."""
    model: str
    is_stream: bool
    shows_usage: bool = True
    shows_cost: bool = False
    prompt_tokens: int = 0
    output_tokens: int = 0
    """The most that may come out, for each of *choices*."""
    choices: int = 1
    media: Media = NO_MEDIA
    """What of an answer is billed by the piece or by time, as far as the request says."""
    wants_text: bool = False
    """Whether a transcript is wanted as text: asked for as JSON, which says what it took."""

    def __repr__(self) -> str:
        return f"ParsedRequest({self.model!r}, {len(self.body)} bytes)"

    def upstream_body(self, model: str) -> bytes:
        """Return the body to send, with the deployment's own *model* name and, on streams, with usage asked for."""
        fields = self.fields
        if fields is None:
            changes = {"response_format": ("text", "json")} if self.wants_text else {}
            if model != self.model:
                changes["model"] = (self.model, model)
            return with_values(self.body, self.content_type, changes) if changes else self.body
        # Always: an earlier attempt may have written another deployment's name.
        fields["model"] = msgspec.Raw(_encode(model))
        return _encode(fields)

    def decoded(self) -> dict[str, Any]:
        """Return the whole body decoded, for upstreams that translate it. Errors: BodyInvalid."""
        if self.fields is None:
            raise BodyInvalid("This model does not accept multipart forms.")
        return _decode(msgspec.json.Decoder(dict[str, Any]), _encode(self.fields), "body")


def parse(endpoint: Endpoint, content_type: bytes, body: bytes, output_tokens_max: int) -> ParsedRequest:
    """Read what we need of *body*. Errors: BodyInvalid, in OpenAI's words where it has them."""
    if endpoint.body == "form":
        return _parse_form(content_type, body)
    fields = _decode_fields(body)
    model = _model(fields)
    is_stream = endpoint.can_stream and "stream" in fields and bool(_decode(_flag, fields["stream"], "stream"))
    prompt_tokens = estimate_prompt_tokens(fields, len(body))
    output_tokens, choices = 0, 1
    media = NO_MEDIA
    if endpoint.generates_tokens:
        output_tokens = estimate_output_tokens(fields, output_tokens_max)
        choices = count_choices(fields)
    elif endpoint.operation == "image_generation":
        media = Media(count_choices(fields), 0)
    shows_usage, shows_cost = True, False
    if is_stream and endpoint.has_usage_option:
        shows_usage, shows_cost = _ask_for_usage(fields)
    return ParsedRequest(
        fields, body, JSON, model, is_stream, shows_usage, shows_cost, prompt_tokens, output_tokens, choices, media
    )


def _ask_for_usage(fields: Fields) -> tuple[bool, bool]:
    """Ask the provider for usage on every stream; tell whether the caller wants to see it, and what it costs."""
    raw = fields.get("stream_options")
    if raw is None:
        fields["stream_options"] = _USAGE_ASKED
        return False, False
    options = _decode(_stream_options, raw, "stream_options")
    shows_cost = bool(options and options.include_cost)
    shows_usage = shows_cost or bool(options and options.include_usage)
    # Put together again also where it says what we want: it may say it twice, and differently.
    others = _decode(_fields, raw, "stream_options") if options is not None else {}
    others.pop("include_cost", None)
    fields["stream_options"] = msgspec.Raw(_encode({**others, "include_usage": True}))
    return shows_usage, shows_cost


def _decode_fields(body: bytes) -> Fields:
    try:
        return _fields.decode(body)
    except msgspec.ValidationError:
        raise BodyInvalid("Invalid body: expected a JSON object.") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BodyInvalid("We could not parse the JSON body of your request.") from None
    except RecursionError:
        raise BodyInvalid("We could not parse the JSON body of your request: it is nested too deeply.") from None


def _model(fields: Fields) -> str:
    raw = fields.get("model")
    if raw is None:
        raise BodyInvalid("you must provide a model parameter")
    return checked_model(_decode(_text, raw, "model"))


def checked_model(model: str) -> str:
    """Return *model* if it could be a model's name. Errors: BodyInvalid."""
    if not model or len(model) > _MODEL_LENGTH_MAX or not model.isprintable():
        raise BodyInvalid("Invalid value for 'model'.", param="model")
    return model


def _decode(decoder: msgspec.json.Decoder[_T], raw: msgspec.Raw | bytes, name: str) -> _T:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise BodyInvalid(f"Invalid type or value for '{name}'.", param=name) from None


def _parse_form(content_type: bytes, body: bytes) -> ParsedRequest:
    """Find the model in a multipart form; the form itself goes upstream as it is.

    A second `model` part is refused: the provider might read the other one.
    """
    values = _form_texts(content_type, body, {"model", "stream", "response_format"})
    models = values.get("model", [])
    if not models:
        raise BodyInvalid("you must provide a model parameter")
    for name, found in values.items():
        if len(found) > 1:
            raise BodyInvalid("Invalid form: a field is given twice.", param=name)
    is_stream = values.get("stream", [""])[0].lower() in {"true", "1"}
    return ParsedRequest(
        None,
        body,
        content_type,
        checked_model(models[0]),
        is_stream,
        media=Media(0, estimate_audio_seconds(len(body))),
        # Also of a stream: its events are the same, and a model that cannot stream answers whole.
        wants_text=values.get("response_format") == ["text"],
    )


def _form_texts(content_type: bytes, body: bytes, names: set[str]) -> dict[str, list[str]]:
    boundary = boundary_of(content_type)
    found: dict[str, list[str]] = {}
    chunks: list[bytes] | None = None
    segment: MultipartSegment | None = None
    try:
        with PushMultipartParser(boundary, content_length=len(body), max_segment_count=64) as parser:
            for part in parser.parse(body):
                if isinstance(part, MultipartSegment):
                    segment = part
                    chunks = [] if part.name in names else None
                    if chunks is not None and part.filename is not None:
                        raise BodyInvalid(f"Invalid form: '{part.name}' is not a file.", param=part.name)
                elif part is not None and chunks is not None:
                    chunks.append(bytes(part[: _MODEL_LENGTH_MAX + 1]))
                elif part is None and chunks is not None and segment is not None:
                    found.setdefault(str(segment.name), []).append(b"".join(chunks).decode())
    except (MultipartError, UnicodeDecodeError):
        raise BodyInvalid("Invalid form: it could not be parsed.") from None
    return found
