"""What we read of a request; everything else passes through as it came.

A JSON body is taken apart at its top level only. What goes upstream is put together again from those parts, never the
caller's bytes: a body with two `model` keys must not be read one way here and another way there.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from inference.endpoints import Endpoint
from inference.errors import BodyInvalid
from inference.forms import Form, Part, form_of
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
_FORM_FIELDS: Final = frozenset({"model", "stream", "response_format"})
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
    form: Form | None = None
    """What was sent instead of JSON."""
    wants_text: bool = False
    """Whether a transcript is wanted as text: asked for as JSON, which says what it took."""

    def __repr__(self) -> str:
        return f"ParsedRequest({self.model!r}, {len(self.body)} bytes)"

    def upstream_body(self, model: str) -> bytes:
        """Return the body to send, with the deployment's own *model* name and, on streams, with usage asked for."""
        fields = self.fields
        if fields is None:
            changes = {"model": model.encode()}
            if self.wants_text:
                changes["response_format"] = b"json"
            assert self.form is not None
            return self.form.written(changes)
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
    """Read of a multipart form what concerns us. Errors: BodyInvalid, also for a field of ours that is given twice."""
    values: dict[str, str] = {}
    form = form_of(content_type, body)
    for part in form.parts():
        if part.name not in _FORM_FIELDS:
            continue
        if part.is_file or part.name in values:
            what = "is not a file" if part.is_file else "is given twice"
            raise BodyInvalid(f"Invalid form: '{part.name}' {what}.", param=part.name)
        values[part.name] = _form_text(part)
    if "model" not in values:
        raise BodyInvalid("you must provide a model parameter")
    return ParsedRequest(
        None,
        body,
        form.media_type,
        checked_model(values["model"]),
        is_stream=values.get("stream", "").lower() in {"true", "1"},
        media=Media(0, estimate_audio_seconds(len(body))),
        form=form,
        # Also of a stream: its events are the same, and a model that cannot stream answers whole.
        wants_text=values.get("response_format") == "text",
    )


def _form_text(part: Part) -> str:
    try:
        return part.value[: _MODEL_LENGTH_MAX + 1].decode()
    except UnicodeDecodeError:
        raise BodyInvalid(f"Invalid type or value for '{part.name}'.", param=part.name) from None
