"""How a change to a key reaches every gateway: a message at once, a sequence to read up on, and acknowledgements.

A gateway trusts its cache only while `KeyFeed.is_live`: a PING on the very connection that carries the messages was
answered within the last second, so everything published before it has arrived. Whatever was missed is read from
`key_changes`, on every new connection and every two seconds besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Final, cast

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError
from sqlalchemy import func, select

from core.database import DOWN, Database
from core.ids import GatewayId, KeyId, OrganizationId
from core.redis import connect
from keys.tables import KeyChangeRow

_CHANNEL: Final = "aap:key-changes"
_GATEWAYS: Final = "aap:gateways"
_PING_SECONDS: Final = 0.25
_LIVE_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 2.0
_REGISTER_SECONDS: Final = 1.0
_ACKNOWLEDGE_SECONDS_MAX: Final = 2.0
# On Redis's clock: gateways need not agree about the time.
_REGISTER: Final = """
local now = tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
if ARGV[1] ~= '' then redis.call('ZADD', KEYS[1], now + 3, ARGV[1]) end
return redis.call('ZRANGE', KEYS[1], 0, -1)
"""
_DOWN = (RedisError, OSError, TimeoutError)
_log = structlog.get_logger(__name__)


class KeyChange(msgspec.Struct, frozen=True, kw_only=True):
    """One key, or (None) all of an organization's keys, must be read again."""

    sequence: int
    organization_id: OrganizationId
    key_id: KeyId | None


class Propagation(msgspec.Struct, frozen=True, kw_only=True):
    """Which gateways have dropped a changed key from their caches, and which have not said so."""

    acknowledged: list[str]
    missing: list[str]

    @property
    def is_complete(self) -> bool:
        """Whether every live gateway has acknowledged."""
        return not self.missing


async def announce(redis: Redis, change: KeyChange) -> Propagation:
    """Tell every gateway; return once all live ones have acknowledged, or say which have not within two seconds.

    Call it after the change is committed. When Redis is down: nobody can be told, and every gateway stops trusting its
    cache within a second; the answer names no gateway as acknowledged and `redis` as missing.
    """
    try:
        live: set[str] = {_text(member) for member in await _gateways(redis, "")}
        await cast("Any", redis).publish(_CHANNEL, msgspec.json.encode(change))
        acknowledged = await _collect(redis, change, live)
    except _DOWN:
        return Propagation(acknowledged=[], missing=["redis"])
    return Propagation(acknowledged=sorted(acknowledged), missing=sorted(live - acknowledged))


async def _collect(redis: Redis, change: KeyChange, live: set[str]) -> set[str]:
    acknowledged: set[str] = set()
    deadline = time.monotonic() + _ACKNOWLEDGE_SECONDS_MAX
    while live - acknowledged and time.monotonic() < deadline:
        answer = await cast("Any", redis.blpop([_acknowledgements(change.sequence)], timeout=0.2))
        if answer is not None:
            acknowledged.add(_text(answer[1]))
    return acknowledged


class KeyFeed:
    """Listens for changes in one gateway process, and counts the living gateways."""

    def __init__(self, gateway_id: GatewayId, database: Database, redis_url: str) -> None:
        self.gateway_id = gateway_id
        self._database = database
        self._redis_url = redis_url
        self._redis = connect(redis_url)
        self._forget: Callable[[OrganizationId, KeyId | None], None] = _nobody
        self._heard_at = 0.0
        self._sequence = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.live_gateways = 1

    def is_live(self) -> bool:
        """Tell whether everything published until a second ago has arrived here."""
        return time.monotonic() - self._heard_at < _LIVE_SECONDS

    async def start(self, forget: Callable[[OrganizationId, KeyId | None], None]) -> None:
        """Start listening; *forget* is called for every change. Returns also when a store is down."""
        self._forget = forget
        with contextlib.suppress(*DOWN):
            self._sequence = await self._newest()
        with contextlib.suppress(*_DOWN):
            await self._register()
        self._tasks = [
            asyncio.create_task(self._forever(self._listen, pause_seconds=0.2)),
            asyncio.create_task(self._forever(self._poll, pause_seconds=_POLL_SECONDS)),
            asyncio.create_task(self._forever(self._register, pause_seconds=_REGISTER_SECONDS)),
        ]

    async def close(self) -> None:
        """Stop listening, and leave the list of living gateways."""
        pending = set(self._tasks)
        while pending:
            # Again and again: a client library in the middle of a wait may swallow a cancellation.
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.2)
        with contextlib.suppress(*_DOWN):
            await self._redis.zrem(_GATEWAYS, self.gateway_id)
        await self._redis.aclose()

    async def _forever(self, act: Callable[[], Any], *, pause_seconds: float) -> None:
        while True:
            try:
                await act()
            except Exception as error:  # noqa: BLE001 - whatever ended one round, the next one must come
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    # redis-py closing its connection may replace our own cancellation by an error of its own.
                    return
                _log.warning("key_feed.interrupted", act=act.__name__, error=type(error).__name__)
            await asyncio.sleep(pause_seconds)

    async def _listen(self) -> None:
        # Its own connection: a PING and the messages must travel on the same one, in order.
        redis = connect(self._redis_url)
        try:
            # A cluster's client must have seen the nodes before it can subscribe.
            await cast("Any", redis).initialize()
            async with cast("Any", redis).pubsub() as pubsub:
                await pubsub.subscribe(_CHANNEL)
                # Only what is published after Redis has confirmed is heard; what was before is read up on.
                async with asyncio.timeout(_LIVE_SECONDS):
                    while not _is_confirmation(await pubsub.get_message(timeout=_PING_SECONDS)):
                        pass
                await self._poll()
                await self._follow(pubsub)
        finally:
            await redis.aclose()

    async def _follow(self, pubsub: Any) -> None:
        pinged_at, answered_at = time.monotonic(), 0.0
        await pubsub.ping()
        while True:
            message = await pubsub.get_message(timeout=_PING_SECONDS)
            now = time.monotonic()
            if message is not None and message["type"] == "pong":
                # Everything that was published before the ping was sent has been read by now.
                self._heard_at, answered_at = pinged_at, now
            elif message is not None and message["type"] == "message":
                await self._hear(message["data"])
            if answered_at >= pinged_at and now - pinged_at >= _PING_SECONDS:
                pinged_at = now
                await pubsub.ping()
            elif now - pinged_at > _LIVE_SECONDS:
                raise TimeoutError

    async def _hear(self, data: bytes) -> None:
        try:
            change = msgspec.json.decode(data, type=KeyChange)
        except msgspec.DecodeError:
            # Not from a release that we know. What it meant stands in `key_changes` too.
            _log.warning("key_feed.not_understood")
            await self._poll()
            return
        self._forget(change.organization_id, change.key_id)
        name = _acknowledgements(change.sequence)
        await cast("Any", self._redis.rpush(name, self.gateway_id))
        await self._redis.expire(name, 60)

    async def _poll(self) -> None:
        """Apply every change since the last one seen. Redis may have lost a message; this never does."""
        statement = select(KeyChangeRow).where(KeyChangeRow.sequence > self._sequence).order_by(KeyChangeRow.sequence)
        async with self._database.transaction() as session:
            rows = list(await session.scalars(statement))
        for row in rows:
            self._forget(OrganizationId(row.organization_id), KeyId(row.key_id) if row.key_id else None)
            self._sequence = row.sequence

    async def _newest(self) -> int:
        async with self._database.transaction() as session:
            return await session.scalar(select(func.coalesce(func.max(KeyChangeRow.sequence), 0))) or 0

    async def _register(self) -> None:
        self.live_gateways = max(1, len(await _gateways(self._redis, self.gateway_id)))


async def _gateways(redis: Redis, joining: str) -> list[bytes]:
    return await cast("Any", redis.eval(_REGISTER, 1, _GATEWAYS, joining))


def _is_confirmation(message: dict[str, Any] | None) -> bool:
    return message is not None and message["type"] == "subscribe"


def _acknowledgements(sequence: int) -> str:
    return f"aap:key-acknowledgements:{sequence}"


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _nobody(organization_id: OrganizationId, key_id: KeyId | None) -> None:
    """Forget nothing: nobody listens yet."""
