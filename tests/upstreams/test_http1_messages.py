"""Base URLs, and what a request looks like on the wire."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.http1.messages import CLIENT_HEADERS, Origin, UpstreamRequest, encode_head, parse_base_url

from .conftest import DEADLINES

ORIGIN = Origin("https", "api.example.com", 443)


class TestBaseUrl:
    @pytest.mark.parametrize(
        ("url", "origin", "prefix"),
        [
            ("https://api.example.com", ORIGIN, b""),
            ("https://API.example.com/", ORIGIN, b""),
            ("https://api.example.com/v1/", ORIGIN, b"/v1"),
            ("http://localhost:8000/a/b", Origin("http", "localhost", 8000), b"/a/b"),
            ("http://[::1]:81", Origin("http", "::1", 81), b""),
            ("http://[2001:DB8:0::1]", Origin("http", "2001:db8::1", 80), b""),
            ("https://bücher.example", Origin("https", "xn--bcher-kva.example", 443), b""),
            ("http://my_host", Origin("http", "my_host", 80), b""),
        ],
    )
    def test_accepted(self, url: str, origin: Origin, prefix: bytes) -> None:
        assert parse_base_url(url) == (origin, prefix)

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "api.example.com",
            "//api.example.com",
            "ftp://api.example.com",
            "file:///etc/passwd",
            "https://",
            "https:///v1",
            "https://user:planted@api.example.com",
            "https://user@api.example.com",
            "https://@api.example.com",
            "https://api.example.com/?a=planted",
            "https://api.example.com/?",
            "https://api.example.com/#planted",
            "https://api.example.com/\r\nplanted",
            "https://api.example.com/a b",
            "https://api.example.com\\@planted",
            "https://api.example.com/\x00",
            "https://api.example.com/\x7f",
            "https://api.example.com:0",
            "https://api.example.com:",
            "https://api.example.com:99999",
            "https://api.example.com:port",
            "https://[::1",
            "https://[::1%25eth0]",
            "https://[nonsense]",
            "https://exa mple",
            "https://exa..mple",
            "https://-example",
            "https://" + "a" * 64,
            "https://" + ".".join(["a" * 60] * 5),
            "https://" + "ü" * 64,
            "https://api.example.com/ü",
        ],
    )
    def test_refused_in_words_that_do_not_quote(self, url: str) -> None:
        with pytest.raises(ValueError, match="URL") as caught:
            parse_base_url(url)
        assert "planted" not in str(caught.value)


def head_of(headers=(), method=b"POST", target=b"/", body=b"") -> bytes:
    return encode_head(UpstreamRequest(ORIGIN, method, target, headers, body), b"", b"host: h\r\n")


class TestHead:
    async def test_a_request_as_it_arrives(self, client, upstream) -> None:
        headers = [(b"authorization", b"Bearer k"), (b"Content-Type", b"application/json")]
        task = asyncio.create_task(client.send(upstream.request(headers=headers), DEADLINES))
        raw = await (await upstream.accept()).answer()
        await task
        assert raw == (
            b"POST /v1/chat HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nauthorization: Bearer k\r\n"
            b"Content-Type: application/json\r\naccept-encoding: identity\r\ncontent-length: 2\r\n\r\n{}"
            % upstream.port
        )

    def test_an_encoding_the_caller_asks_for_is_left_alone(self) -> None:
        head = head_of([(b"Accept-Encoding", b"gzip")])
        assert head.lower().count(b"accept-encoding") == 1

    def test_an_empty_body_has_a_length_only_where_one_is_expected(self) -> None:
        assert b"content-length: 0\r\n" in head_of(method=b"POST")
        assert b"content-length" not in head_of(method=b"GET")

    @pytest.mark.parametrize("name", sorted(CLIENT_HEADERS))
    def test_framing_and_hop_headers_are_the_clients_own(self, name: bytes) -> None:
        for spelling in (name, name.title()):
            with pytest.raises(ValueError, match=name.decode()):
                head_of([(spelling, b"planted")])

    @pytest.mark.parametrize("name", [b"", b"a b", b"a:", b"a\r\nb", b"\xff", b"a\0"])
    def test_names_that_are_no_token_are_refused(self, name: bytes) -> None:
        with pytest.raises(ValueError, match="name"):
            head_of([(name, b"v")])

    @pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\n", b"\r", b"a\0"])
    def test_values_that_break_their_line_are_refused(self, value: bytes) -> None:
        with pytest.raises(ValueError, match="line break"):
            head_of([(b"a", value)])

    @pytest.mark.parametrize("target", [b"", b"v1", b"/a b", b"/\r\n", b"/\xff", b"/#a", b"http://a/"])
    def test_targets_that_are_no_path_are_refused(self, target: bytes) -> None:
        with pytest.raises(ValueError, match="target"):
            head_of(target=target)

    @pytest.mark.parametrize("method", [b"", b"GET /", b"G\r\n", b"CONNECT"])
    def test_methods_that_are_no_token_are_refused(self, method: bytes) -> None:
        with pytest.raises(ValueError, match="method"):
            head_of(method=method)

    @given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20)), max_size=5))
    def test_no_headers_can_add_a_line(self, headers) -> None:
        """Guarantee: what goes out has exactly one line per header, whatever the caller hands in."""
        try:
            head = head_of(headers)
        except ValueError:
            return
        assert head.endswith(b"\r\n\r\n")
        lines = head[:-4].split(b"\r\n")
        extra = 4 - any(name.lower() == b"accept-encoding" for name, _ in headers)
        assert len(lines) == len(headers) + extra

    def test_repr_shows_neither_headers_nor_body_nor_query(self) -> None:
        request = UpstreamRequest(ORIGIN, b"POST", b"/?key=planted", [(b"a", b"planted")], b"planted")
        assert "planted" not in repr(request)
