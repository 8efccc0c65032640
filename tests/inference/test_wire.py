"""What is read of a request, what is estimated, and what goes upstream."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.endpoints import ENDPOINTS, Endpoint
from inference.errors import BodyInvalid
from inference.tokens import count_choices, estimate_output_tokens, estimate_prompt_tokens
from inference.wire import ParsedRequest, parse
from tests.harness.forms import read_form

JSON = b"application/json"
CHAT: Endpoint = next(one for one in ENDPOINTS if one.path.endswith("/chat/completions"))
FORM: Endpoint = next(one for one in ENDPOINTS if one.body == "form")
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


def read(body: dict[str, Any] | bytes, output_tokens_max: int = 100_000) -> ParsedRequest:
    return parse(CHAT, JSON, body if isinstance(body, bytes) else msgspec.json.encode(body), output_tokens_max)


def upstream(request: ParsedRequest, model: str = "fake") -> dict[str, Any]:
    return msgspec.json.decode(request.upstream_body(model))


class TestParse:
    @given(
        st.dictionaries(
            st.text().filter(
                lambda name: (
                    name not in {"model", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens"}
                )
            ),
            json_values,
            max_size=5,
        )
    )
    def test_whatever_else_is_in_the_body_goes_upstream_as_it_came(self, more: dict[str, Any]) -> None:
        request = read({**more, "model": "m", "messages": []} if "messages" not in more else {**more, "model": "m"})
        expected = {**more, "model": "fake"} if "messages" in more else {**more, "model": "fake", "messages": []}
        assert upstream(request) == expected

    def test_numbers_keep_their_spelling(self) -> None:
        request = read(b'{"model":"m","messages":[],"seed":12345678901234567890123,"temperature":1.50,"x":1e5}')
        body = request.upstream_body("fake")
        for spelled in (b"12345678901234567890123", b"1.50", b"1e5"):
            assert spelled in body

    def test_each_attempt_carries_the_name_of_its_own_deployment(self) -> None:
        """Guarantee: a fallback asks for the model as its provider calls it, also when that is what the caller wrote."""
        request = read({"model": "m", "messages": []})
        assert [upstream(request, name)["model"] for name in ("azure-m", "m", "other", "m")] == [
            "azure-m",
            "m",
            "other",
            "m",
        ]

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[]", b"1", b'"x"', b"null", b'{"model":"m",}', b"\xff", b'{"model":"m"} x', b'{"a":' * 5_000],
    )
    def test_what_is_no_json_object(self, body: bytes) -> None:
        with pytest.raises(BodyInvalid):
            read(body)

    @pytest.mark.parametrize("model", [None, 1, "", "a" * 257, "a\nb", "a\x00", ["m"], {"x": 1}])
    def test_what_is_no_model(self, model: object) -> None:
        with pytest.raises(BodyInvalid) as caught:
            read({"model": model, "messages": []})
        assert caught.value.param == "model"

    def test_no_model_at_all_is_said_in_openais_words(self) -> None:
        with pytest.raises(BodyInvalid, match="you must provide a model parameter"):
            read({"messages": []})

    @pytest.mark.parametrize(("stream", "expected"), [(True, True), (False, False), (None, False)])
    def test_streaming(self, stream: object, *, expected: bool) -> None:
        assert read({"model": "m", "stream": stream}).is_stream is expected

    @pytest.mark.parametrize("stream", [1, "true", [], {}])
    def test_what_is_no_flag(self, stream: object) -> None:
        with pytest.raises(BodyInvalid) as caught:
            read({"model": "m", "stream": stream})
        assert caught.value.param == "stream"


class TestUsage:
    @pytest.mark.parametrize(
        ("options", "shown", "sent"),
        [
            ("absent", False, {"include_usage": True}),
            (None, False, {"include_usage": True}),
            ({}, False, {"include_usage": True}),
            ({"include_usage": False, "x": [1]}, False, {"include_usage": True, "x": [1]}),
            ({"include_usage": None}, False, {"include_usage": True}),
            ({"include_usage": True, "x": 1}, True, {"include_usage": True, "x": 1}),
        ],
    )
    def test_it_is_always_asked_for_on_streams(self, options: object, sent: object, *, shown: bool) -> None:
        body: dict[str, object] = {"model": "m", "stream": True}
        request = read(body if options == "absent" else {**body, "stream_options": options})
        assert request.shows_usage is shown
        assert upstream(request)["stream_options"] == sent

    def test_it_is_not_asked_for_otherwise(self) -> None:
        assert "stream_options" not in upstream(read({"model": "m"}))

    @pytest.mark.parametrize("options", [1, "x", [], {"include_usage": "yes"}])
    def test_what_is_no_options(self, options: object) -> None:
        with pytest.raises(BodyInvalid) as caught:
            read({"model": "m", "stream": True, "stream_options": options})
        assert caught.value.param == "stream_options"


class TestForm:
    @staticmethod
    def form(*parts: tuple[str, str], boundary: str = "xyz") -> bytes:
        fields = "".join(
            f"--{boundary}\r\ncontent-disposition: form-data; {head}\r\n\r\n{value}\r\n" for head, value in parts
        )
        return f"{fields}--{boundary}--\r\n".encode()

    def read(self, body: bytes, content_type: bytes = b"multipart/form-data; boundary=xyz") -> ParsedRequest:
        return parse(FORM, content_type, body, 1)

    def test_the_model_is_found_and_the_form_goes_upstream_as_it_says(self) -> None:
        body = self.form(('name="file"; filename="a.wav"', "model"), ('name="model"', "whisper-1"), ('name="x"', "y"))
        request = self.read(body)
        assert (request.model, request.is_stream) == ("whisper-1", False)
        sent = read_form(request.content_type.decode(), request.upstream_body("whisper-2"))
        assert sent == [("file", "a.wav", b"model"), ("model", None, b"whisper-2"), ("x", None, b"y")]
        with pytest.raises(BodyInvalid):
            request.decoded()

    def test_a_file_named_model_is_not_the_model(self) -> None:
        with pytest.raises(BodyInvalid):
            self.read(self.form(('name="model"; filename="x"', "whisper-1")))

    @pytest.mark.parametrize("name", ["model", "stream"])
    def test_a_field_given_twice_is_refused(self, name: str) -> None:
        with pytest.raises(BodyInvalid):
            self.read(self.form(('name="model"', "a"), (f'name="{name}"', "b"), (f'name="{name}"', "c")))

    @pytest.mark.parametrize(
        "content_type",
        [b"multipart/form-data", b"application/json", b"multipart/form-data; boundary=other", b"", b"\xff"],
    )
    def test_what_is_no_form(self, content_type: bytes) -> None:
        with pytest.raises(BodyInvalid):
            self.read(self.form(('name="model"', "a")), content_type)

    @pytest.mark.parametrize("body", [b"", b"--xyz", b"--xyz\r\n\r\n", b"--xyz--", b"\x00" * 100])
    def test_a_broken_form(self, body: bytes) -> None:
        with pytest.raises(BodyInvalid):
            self.read(body)


class TestEstimates:
    @staticmethod
    def prompt(body: dict[str, Any]) -> int:
        encoded = msgspec.json.encode(body)
        return estimate_prompt_tokens(msgspec.json.decode(encoded, type=dict[str, msgspec.Raw]), len(encoded))

    @staticmethod
    def output(body: dict[str, Any], most: int = 10**9) -> int:
        fields = msgspec.json.decode(msgspec.json.encode(body), type=dict[str, msgspec.Raw])
        return estimate_output_tokens(fields, most) * count_choices(fields)

    @given(st.integers(0, 200_000))
    def test_text_is_about_four_bytes_a_token_at_every_size(self, size: int) -> None:
        found = self.prompt({"messages": [{"role": "user", "content": "a" * size}]})
        assert found >= 1
        assert size / 4 - 1 <= found <= size / 4 + 25

    def test_an_inline_picture_counts_as_a_picture_and_not_as_its_bytes(self) -> None:
        picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "a" * 2_000_000}}
        text = {"type": "text", "text": "a" * 400}
        found = self.prompt({"messages": [{"role": "user", "content": [text, picture, picture]}]})
        assert 3_000 <= found <= 3_200

    @pytest.mark.parametrize("messages", ["x", 5, None, [1], [{"content": 5}], [[]], {"a": 1}])
    def test_odd_messages_are_estimated_by_size(self, messages: object) -> None:
        assert self.prompt({"messages": messages}) >= 1
        assert self.prompt({"messages": messages, "x": "a" * 100_000}) >= 20_000 or messages is None

    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ({}, 1_024),
            ({"max_tokens": 7}, 7),
            ({"max_completion_tokens": 5, "max_tokens": 7}, 5),
            ({"max_tokens": 7, "n": 3}, 21),
            ({"max_tokens": 7, "n": 10**9}, 7 * 128),
            ({"max_tokens": 10**9}, 50_000),
            ({"max_tokens": 10**9, "n": 2}, 100_000),
            ({"max_tokens": 0}, 1_024),
            ({"max_tokens": -5}, 1_024),
            ({"max_tokens": None}, 1_024),
            ({"max_tokens": True}, 1_024),
            ({"max_tokens": "7"}, 1_024),
            ({"max_tokens": 7.5}, 1_024),
            ({"n": 0}, 1_024),
            ({"n": "many"}, 1_024),
        ],
    )
    def test_the_output_is_what_the_caller_allows_within_the_models_bounds(
        self, body: dict[str, Any], expected: int
    ) -> None:
        assert self.output(body, 50_000) == expected
