"""Providers that speak OpenAI's wire format: the caller's bytes go there, and theirs come back."""

from __future__ import annotations

from collections.abc import Awaitable

import msgspec

from core.http1.client import Http1Client
from core.http1.messages import Origin, UpstreamRequest, parse_base_url
from core.version import VERSION
from inference.catalog import Provider
from inference.endpoints import ENDPOINTS
from inference.upstreams.base import Answer, UpstreamCall
from inference.wire import JSON

_USER_AGENT = b"aap-gateway/" + VERSION.encode()


class _Target(msgspec.Struct, frozen=True):
    """What never changes between calls to one provider."""

    origin: Origin
    paths: dict[str, bytes]
    headers: tuple[tuple[bytes, bytes], ...]
    json_headers: tuple[tuple[bytes, bytes], ...]


class OpenAIHttp:
    """Calls OpenAI-compatible providers over our own HTTP/1.1 client (decision 0002)."""

    def __init__(self, client: Http1Client) -> None:
        self._client = client
        self._targets: dict[int, tuple[Provider, _Target]] = {}

    def open(self, call: UpstreamCall) -> Awaitable[Answer]:
        """Send the call; return when the answer's head is there. Errors: UpstreamError."""
        deployment, request = call.deployment, call.request
        target = self._target(deployment.provider)
        content_type = request.content_type
        # The very same headers each time are encoded once; a form's content type has a boundary of its own.
        headers = target.json_headers if content_type == JSON else (*target.headers, (b"content-type", content_type))
        upstream = UpstreamRequest(
            target.origin, b"POST", target.paths[call.endpoint.path], headers, request.upstream_body(deployment.model)
        )
        return self._client.send(upstream, deployment.deadlines, call.permit)

    async def close(self) -> None:
        """Close every connection."""
        await self._client.close()

    def _target(self, provider: Provider) -> _Target:
        # By identity, with the provider kept beside it: a reload makes new ones, perhaps at old addresses.
        known = self._targets.get(id(provider))
        if known is not None and known[0] is provider:
            return known[1]
        if len(self._targets) > 1_000:
            self._targets.clear()
        target = _target_of(provider)
        self._targets[id(provider)] = (provider, target)
        return target


def _target_of(provider: Provider) -> _Target:
    origin, prefix = parse_base_url(provider.settings.base_url or "")
    headers = [(b"accept", b"application/json, text/event-stream"), (b"user-agent", _USER_AGENT)]
    if provider.api_key is not None:
        headers.append((b"authorization", b"Bearer " + provider.api_key.encode()))
    headers += [(name.lower().encode(), value.encode()) for name, value in provider.settings.headers.items()]
    paths = {endpoint.path: prefix + endpoint.path.encode() for endpoint in ENDPOINTS}
    return _Target(origin, paths, tuple(headers), (*headers, (b"content-type", JSON)))
