"""Wrong methods, unknown paths, forms: OpenAI's error form everywhere, and nothing for who may not see it."""

from __future__ import annotations

import pytest

from tests.harness.forms import sent_form
from tests.harness.gateway import Gateway
from tests.harness.provider import FakeProvider
from tests.harness.raw import RawAnswer, call, post
from tests.harness.tenant import Tenant
from tests.hostile.conftest import assert_clear_error, spoken, statuses

_HOT = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/images/generations",
    "/v1/audio/transcriptions",
)
_FORM = "/v1/audio/transcriptions"
_BOUNDARY = "frontier"


async def _bare(gateway: Gateway, method: str, path: str, *lines: str) -> RawAnswer:
    return await call(gateway.port, "\r\n".join([f"{method} {path} HTTP/1.1", "host: a", *lines, "", ""]).encode())


class TestMethods:
    @pytest.mark.parametrize("path", _HOT)
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
    async def test_hot_routes_take_only_post(self, gateway: Gateway, method: str, path: str, tenant: Tenant) -> None:
        got = await _bare(gateway, method, path, f"authorization: Bearer {tenant.key}")
        assert (got.status, assert_clear_error(got)["code"]) == (405, "method_not_allowed")
        assert got.headers["allow"].upper() == "POST"

    @pytest.mark.parametrize("method", ["post", "Post", "FETCH", "P\tST"])
    async def test_what_is_no_method_is_no_request(self, gateway: Gateway, method: str, tenant: Tenant) -> None:
        got = await _bare(gateway, method, "/v1/chat/completions", f"authorization: Bearer {tenant.key}")
        assert (got.status, assert_clear_error(got)["code"]) == (400, "malformed_request")
        assert got.headers["connection"] == "close"

    @pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/livez", "/readyz", "/openapi.json"])
    async def test_the_other_routes_take_no_post(self, gateway: Gateway, path: str, tenant: Tenant) -> None:
        got = await _bare(gateway, "POST", path, f"authorization: Bearer {tenant.key}", "content-length: 0")
        assert (got.status, assert_clear_error(got)["code"]) == (405, "method_not_allowed")

    async def test_a_head_request_is_answered_without_a_body(self, gateway: Gateway) -> None:
        said = await spoken(gateway.port, b"HEAD /v1/chat/completions HTTP/1.1\r\nhost: a\r\n\r\n")
        assert statuses(said) == [405]
        assert said.endswith(b"\r\n\r\n")


class TestUnknownPaths:
    @pytest.mark.parametrize(
        "path",
        ["/nope", "/", "/v1", "/v1/", "/v1/chat", "/v1/chat/completions/", "/v1/chat/completions/x", "/V1/CHAT/COMPLETIONS",
         "/v2/chat/completions", "/v1/models/a/b/c/d", "/.env", "/%2e%2e/%2e%2e/etc/passwd", "/%ff%fe", "/%00", "/%", "/%zz", "/a%0d%0ab",
         "/schema", "/schema/swagger", "/docs", "/debug", "/%3Cscript%3Ealert(1)%3C/script%3E", "/" + "a" * 20_000, "/" + "a/" * 5_000],
    )  # fmt: skip
    @pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
    async def test_what_is_not_there_is_a_404_in_openais_form(
        self, gateway: Gateway, provider: FakeProvider, method: str, path: str, tenant: Tenant
    ) -> None:
        got = await _bare(gateway, method, path, f"authorization: Bearer {tenant.key}", "content-length: 0")
        error = assert_clear_error(got)
        assert got.status in {404, 405}
        assert len(str(error["message"])) < 400
        assert provider.received == []


class TestMetrics:
    @pytest.mark.parametrize("header", ["x-forwarded-for: 127.0.0.1", "forwarded: for=127.0.0.1", "X-Real-IP: ::1"])
    async def test_a_forwarded_request_finds_no_metrics(self, gateway: Gateway, header: str) -> None:
        got = await _bare(gateway, "GET", "/metrics", header)
        assert (got.status, assert_clear_error(got)["code"]) == (404, "unknown_url")
        assert (await _bare(gateway, "GET", "/nope", header)).body.replace(b"/nope", b"/metrics") == got.body

    async def test_this_machine_sees_them(self, gateway: Gateway) -> None:
        assert b"aap_requests_in_flight" in (await _bare(gateway, "GET", "/metrics")).body


def _part(name: str, value: bytes, disposition: str = "") -> bytes:
    return b'--frontier\r\ncontent-disposition: form-data; name="%b"%b\r\n\r\n%b\r\n' % (
        name.encode(),
        disposition.encode(),
        value,
    )


_FILE = _part("file", b"RIFF\x00\xff" * 50, '; filename="a.wav"')
_MODEL = _part("model", b"fake")
_END = b"--frontier--\r\n"
_TYPE = f"multipart/form-data; boundary={_BOUNDARY}"
_BAD_FORMS = {
    "nothing": (_TYPE, b""),
    "only the end": (_TYPE, _END),
    "no end": (_TYPE, _FILE + _MODEL),
    "cut in a header": (_TYPE, _FILE + _MODEL[:30]),
    "no model": (_TYPE, _FILE + _END),
    "an empty model": (_TYPE, _FILE + _part("model", b"") + _END),
    "two models": (_TYPE, _MODEL + _FILE + _part("model", b"org/fake") + _END),
    "the same model twice": (_TYPE, _MODEL + _FILE + _MODEL + _END),
    "a model that is a file too": (_TYPE, _MODEL + _part("model", b"org/fake", '; filename="x"') + _FILE + _END),
    "a model only as a file": (_TYPE, _part("model", b"fake", '; filename="x"') + _FILE + _END),
    "two streams": (_TYPE, _MODEL + _part("stream", b"true") + _part("stream", b"false") + _FILE + _END),
    "a model of 10 MB": (_TYPE, _part("model", b"a" * 9_000_000) + _FILE + _END),
    "a model in bad UTF-8": (_TYPE, _part("model", b"\xff\xfe") + _FILE + _END),
    "a model with a NUL": (_TYPE, _part("model", b"fa\x00ke") + _FILE + _END),
    "a model with a line end": (_TYPE, _part("model", b"fake\r\nx: y") + _FILE + _END),
    "1,000 parts": (_TYPE, _MODEL + _part("a", b"b") * 1_000 + _END),
    "a header without end": (_TYPE, b"--frontier\r\nx: " + b"a" * 1_000_000),
    "1,000 headers": (_TYPE, b"--frontier\r\n" + b"x: y\r\n" * 1_000 + b"\r\nz\r\n" + _END),
    "no disposition": (_TYPE, b"--frontier\r\n\r\nfake\r\n" + _END),
    "another boundary": (_TYPE, b"--other\r\n\r\nfake\r\n--other--\r\n"),
    "JSON": (_TYPE, b'{"model":"fake"}'),
    "no boundary": ("multipart/form-data", _MODEL + _FILE + _END),
    "an empty boundary": ("multipart/form-data; boundary=", _MODEL + _END),
    "a quoted empty boundary": ('multipart/form-data; boundary=""', _MODEL + _END),
    "a huge boundary": ("multipart/form-data; boundary=" + "b" * 30_000, _MODEL + _END),
    "a boundary in odd letters": ("multipart/form-data; boundary=\u00ff\u00fe", _MODEL + _END),
    "two boundaries": ("multipart/form-data; boundary=a; boundary=frontier", b"--a\r\n\r\n\r\n--a--\r\n"),
    "a boundary with a quote open": ('multipart/form-data; boundary="frontier', b"--x"),
}


class TestForms:
    async def test_a_good_form_says_the_same_to_the_provider(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant
    ) -> None:
        body = _FILE + _MODEL + _END
        got = await call(gateway.port, post(_FORM, tenant.key, body, content_type=_TYPE))
        assert got.status == 200
        sent = provider.received[-1]
        assert sent_form(sent) == [("file", "a.wav", b"RIFF\x00\xff" * 50), ("model", None, b"fake")]
        # Divided by what nobody could have written into a file.
        assert _BOUNDARY not in (sent.header("content-type") or "")

    @pytest.mark.parametrize("name", _BAD_FORMS)
    async def test_a_broken_form_is_a_clear_error_and_reaches_no_provider(
        self, gateway: Gateway, provider: FakeProvider, tenant: Tenant, name: str
    ) -> None:
        content_type, body = _BAD_FORMS[name]
        got = await call(gateway.port, post(_FORM, tenant.key, body, content_type=content_type))
        assert_clear_error(got)
        assert got.status in {400, 404, 415}
        assert provider.received == []
