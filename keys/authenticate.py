"""From a credential to a Principal: in-process cache, else PostgreSQL. Never a guess.

The cache is trusted only while the invalidation feed is alive (`keys/revocation.py`); without it every call asks
PostgreSQL. When PostgreSQL is down too, callers get 503: a refused call is cheaper than a revoked key that works.
There is no copy in Redis (decision 0005).
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import math
import secrets as random
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from sqlalchemy import or_, select

from core.database import DOWN, Database
from core.ids import KeyId, OrganizationId, ProjectId, SecretId
from core.settings import Pepper
from keys import secrets
from keys.allowances import allowances_of
from keys.budgets import Budget, budget_of
from keys.dimensions import DIMENSIONS
from keys.errors import AuthenticationUnavailable, KeyIncorrect, KeyMissing, TooManyFailures
from keys.limits import DefaultLimits, RateLimits
from keys.plans import PlanLimits, no_plans
from keys.principal import Account, Grants, Limits, Principal
from keys.tables import BudgetRow, KeyRow, KeySecretRow, OrganizationRow, RateLimitRow

_PRINCIPALS_MAX: Final = 50_000
_UNKNOWN_MAX: Final = 50_000
_ADDRESSES_MAX: Final = 50_000
# A live feed drops a changed key within milliseconds. The age bounds what an unknown fault of the feed could do.
_AGE_SECONDS_MAX: Final = 30.0
# A PostgreSQL that is silent rather than down: callers hear of it after this long.
_LOAD_SECONDS_MAX: Final = 2.0
_UNKNOWN_SECONDS: Final = 30.0
# Failed authentications per address: a burst for people who paste a wrong key, then one every two seconds.
_FAILURES_BURST: Final = 60
_FAILURES_PER_SECOND: Final = 0.5


class _Entry:
    __slots__ = ("digest", "loaded_at", "principal")

    def __init__(self, digest: bytes, principal: Principal, loaded_at: float) -> None:
        self.digest = digest
        self.principal = principal
        self.loaded_at = loaded_at


class Authenticator:
    """Knows callers by their keys. One per process."""

    def __init__(
        self,
        database: Database,
        peppers: tuple[Pepper, ...],
        *,
        defaults: Callable[[], DefaultLimits],
        is_feed_live: Callable[[], bool],
        plan_limits: Callable[[str], PlanLimits | None] = no_plans,
    ) -> None:
        self._database = database
        self._peppers = peppers
        self._defaults = defaults
        self._plan_limits = plan_limits
        self._is_feed_live = is_feed_live
        # Cache keys are digests under a key of this process: a memory dump holds no credential.
        self._cache_hash = hashlib.blake2b(key=random.token_bytes(32), digest_size=32)
        self._entries: dict[bytes, _Entry] = {}
        self._by_key: dict[KeyId, set[bytes]] = {}
        self._unknown: OrderedDict[bytes, float] = OrderedDict()
        self._loading: dict[bytes, asyncio.Task[Principal | None]] = {}
        self._generation = 0
        self._failures = _FailureBuckets()
        self.last_used: dict[KeyId, float] = {}

    async def authenticate(self, token: bytes | None, address: Callable[[], str]) -> Principal:
        """Return who holds *token*; *address* says where they call from, and is asked only if it matters.

        Errors: KeyMissing, KeyIncorrect, AddressNotAllowed, TooManyFailures, AuthenticationUnavailable.
        """
        if not token:
            raise KeyMissing
        known = self.recall(token, address)
        return known or self._admitted(await self._find(token, address), token, address)

    def recall(self, token: bytes, address: Callable[[], str]) -> Principal | None:
        """As `authenticate`, without waiting; None when PostgreSQL must be asked.

        Without a live feed of changes that is always: what is cached may have been revoked.
        Errors: KeyIncorrect, AddressNotAllowed.
        """
        entry = self._entries.get(self._digest(token))
        if entry is None or not self._is_feed_live() or time.time() - entry.loaded_at >= _AGE_SECONDS_MAX:
            return None
        return self._admitted(entry.principal, token, address)

    def _admitted(self, principal: Principal, token: bytes, address: Callable[[], str]) -> Principal:
        now = time.time()
        if principal.usable_until_seconds <= now:
            raise KeyIncorrect(secrets.hint(token.decode("latin-1")), "It has expired or has been revoked.")
        if principal.grants.ip_networks is not None:
            principal.require_address(address())
        self.last_used[principal.key_id] = now
        return principal

    def forget(self, organization_id: OrganizationId, key_id: KeyId | None) -> None:
        """Drop what is cached of one key, or of all keys of an organization."""
        self._generation += 1
        if key_id is not None:
            for digest in self._by_key.pop(key_id, ()):
                self._entries.pop(digest, None)
            return
        for entry in [e for e in self._entries.values() if e.principal.organization_id == organization_id]:
            self._drop(entry)

    def forget_all(self) -> None:
        """Drop everything: after a gap in the feed that could not be read up on, or when default limits changed."""
        self._generation += 1
        self._entries.clear()
        self._by_key.clear()
        self._unknown.clear()

    def _digest(self, token: bytes) -> bytes:
        digest = self._cache_hash.copy()
        digest.update(token)
        return digest.digest()

    async def _find(self, token: bytes, address: Callable[[], str]) -> Principal:
        digest = self._digest(token)
        text = token.decode("latin-1")
        hint = secrets.hint(text)
        if not secrets.is_well_formed(text):
            raise KeyIncorrect(hint)
        origin = address()
        if digest not in self._entries:
            # A key that was right a moment ago is no guess, whatever others at its address send.
            self._failures.require_room(origin)
        unknown_until = self._unknown.get(digest, 0.0)
        principal = None
        if unknown_until < time.time():
            principal = await self._load_once(text, digest)
        if principal is None:
            self._failures.count(origin)
            self._remember_unknown(digest)
            raise KeyIncorrect(hint)
        return principal

    async def _load_once(self, text: str, digest: bytes) -> Principal | None:
        """Load a key's record; callers who come with the same key meanwhile wait for the same load."""
        task = self._loading.get(digest)
        if task is None:
            task = self._loading[digest] = asyncio.create_task(self._load(text, digest))
            task.add_done_callback(lambda _: self._loading.pop(digest, None))
        try:
            async with asyncio.timeout(_LOAD_SECONDS_MAX):
                return await asyncio.shield(task)
        except DOWN as error:
            raise AuthenticationUnavailable from error

    async def _load(self, text: str, digest: bytes) -> Principal | None:
        while True:
            generation = self._generation
            principal = await self._query(text)
            # A change that was announced while the query ran may be missing from its answer: ask again.
            if generation == self._generation:
                break
        if principal is not None:
            self._remember(_Entry(digest, principal, time.time()))
        return principal

    async def _query(self, text: str) -> Principal | None:
        digests = [secrets.fingerprint(text, pepper).digest for pepper in self._peppers]
        statement = (
            select(KeySecretRow, KeyRow, OrganizationRow)
            .join(KeyRow, KeyRow.id == KeySecretRow.key_id)
            .join(OrganizationRow, OrganizationRow.id == KeyRow.organization_id)
            .where(KeySecretRow.fingerprint.in_(digests))
        )
        async with self._database.transaction() as session:
            found = (await session.execute(statement)).first()
            if found is None:
                return None
            secret, key, organization = found
            limits = await session.scalars(
                select(RateLimitRow).where(
                    RateLimitRow.organization_id == organization.id,
                    or_(
                        RateLimitRow.scope.in_(("organization", "model")),
                        RateLimitRow.scope_id.in_((key.id, key.project_id)),
                    ),
                )
            )
            budgets = await session.scalars(
                select(BudgetRow).where(
                    BudgetRow.organization_id == organization.id,
                    BudgetRow.scope_id.in_((organization.id, key.id, key.project_id)),
                )
            )
            known = tuple(budget_of(row) for row in budgets)
            return _principal(secret, key, organization, self._limits(organization, list(limits), known))

    def _limits(self, organization: OrganizationRow, rows: list[RateLimitRow], budgets: tuple[Budget, ...]) -> Limits:
        defaults = self._defaults()
        found = {
            (row.scope, row.scope_id): RateLimits(**{name: getattr(row, name) for name in DIMENSIONS}) for row in rows
        }
        one = {scope: limits for (scope, _), limits in found.items()}
        models = {name for scope, name in found if scope == "model"} | defaults.model.keys()
        nothing = RateLimits()
        included = None if organization.plan is None else self._plan_limits(organization.plan)
        return Limits(
            key=one.get("key", nothing).over(defaults.key),
            project=one.get("project", nothing).over(defaults.project),
            organization=one.get("organization", nothing).over(defaults.organization),
            model={
                name: found.get(("model", name), nothing).over(defaults.model.get(name, nothing)) for name in models
            },
            budgets=budgets,
            allowances=allowances_of(included, OrganizationId(organization.id)),
        )

    def _remember(self, entry: _Entry) -> None:
        if len(self._entries) >= _PRINCIPALS_MAX:
            self._drop(next(iter(self._entries.values())))
        self._entries[entry.digest] = entry
        self._by_key.setdefault(entry.principal.key_id, set()).add(entry.digest)

    def _drop(self, entry: _Entry) -> None:
        self._entries.pop(entry.digest, None)
        digests = self._by_key.get(entry.principal.key_id)
        if digests is not None:
            digests.discard(entry.digest)
            if not digests:
                del self._by_key[entry.principal.key_id]

    def _remember_unknown(self, digest: bytes) -> None:
        self._unknown[digest] = time.time() + _UNKNOWN_SECONDS
        if len(self._unknown) > _UNKNOWN_MAX:
            self._unknown.popitem(last=False)


class _FailureBuckets:
    """A token bucket of failed authentications per address, in this process. Bounded; the oldest address goes first."""

    def __init__(self) -> None:
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def require_room(self, address: str) -> None:
        """Return if *address* may still fail. Errors: TooManyFailures."""
        level = self._level(address)
        if level < 1:
            raise TooManyFailures((1 - level) / _FAILURES_PER_SECOND)

    def count(self, address: str) -> None:
        """Take one failure from the address's bucket."""
        network = _network_of(address)
        self._buckets[network] = (self._level(address) - 1, time.monotonic())
        self._buckets.move_to_end(network)
        if len(self._buckets) > _ADDRESSES_MAX:
            self._buckets.popitem(last=False)

    def _level(self, address: str) -> float:
        network = _network_of(address)
        level, at = self._buckets.get(network, (float(_FAILURES_BURST), 0.0))
        return min(_FAILURES_BURST, level + (time.monotonic() - at) * _FAILURES_PER_SECOND)


def _network_of(address: str) -> str:
    """Return what one guesser owns: an IPv4 address, or a whole IPv6 /64."""
    if ":" not in address:
        return address
    try:
        mapped = ipaddress.IPv6Address(address).ipv4_mapped
        return str(mapped or ipaddress.IPv6Network((address, 64), strict=False))
    except ValueError:
        return address


def _principal(secret: KeySecretRow, key: KeyRow, organization: OrganizationRow, limits: Limits) -> Principal:
    ends = [moment.timestamp() for moment in (key.expires_at, secret.not_after) if moment]
    if key.disabled_at is not None:
        # Disabled is disabled, whatever the clock of the machine that wrote it said.
        ends.append(0.0)
    networks = key.ip_networks
    return Principal(
        ids=(
            OrganizationId(key.organization_id),
            ProjectId(key.project_id),
            KeyId(key.id),
            SecretId(secret.id),
        ),
        grants=Grants(
            scopes=frozenset(key.scopes),
            models=None if key.models is None else frozenset(key.models),
            ip_networks=None if networks is None else tuple(ipaddress.ip_network(n, strict=False) for n in networks),
        ),
        limits=limits,
        usable_until_seconds=min(ends, default=math.inf),
        account=Account(
            disconnect_policy=organization.disconnect_policy,
            suspended_for=(organization.status_reason or "") if organization.status == "suspended" else None,
            plan_name=organization.plan,
        ),
    )
