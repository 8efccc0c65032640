"""What `aap limits` does."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from gateway.catalog_file import CatalogFile
from gateway.cli.stores import Stores, chosen_organization, on_stores, owner_of
from keys import lifecycle, lookup
from keys.dimensions import LimitScope
from keys.limits import RateLimits
from keys.revocation import KeyChange, Propagation, announce

_NONE = RateLimits()


class LimitRow(msgspec.Struct, frozen=True):
    """The limits of one scope."""

    scope: str
    id: str
    requests_per_minute: int | None
    requests_per_day: int | None
    tokens_per_minute: int | None
    tokens_per_day: int | None
    concurrent_requests: int | None


def list_all(org: str | None) -> list[LimitRow]:
    """Return the limits that were set for an organization and its parts, then the defaults."""

    async def act(stores: Stores) -> list[LimitRow]:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            found = await lifecycle.get_limits(session, organization_id=organization_id)
        defaults = CatalogFile(stores.settings.config_path, os.environ).limits
        rows = [
            LimitRow(scope, scope_id, *limits.as_tuple())
            for (scope, scope_id), limits in sorted(found.items(), key=lambda item: item[0])
            if limits != _NONE
        ]
        rows += [
            LimitRow(f"default {scope}", "*", *getattr(defaults, scope).as_tuple())
            for scope in ("organization", "project", "key")
        ]
        rows += [LimitRow("default model", name, *limits.as_tuple()) for name, limits in defaults.model.items()]
        return rows

    return on_stores(act)


def change(
    scope: LimitScope, scope_id: str | None, org: str | None, changes: Mapping[str, int | None]
) -> tuple[LimitRow, Propagation]:
    """Change some limits of one scope and tell the gateways; return all that it has then, and which of them know."""

    async def act(stores: Stores) -> tuple[LimitRow, Propagation]:
        organization_id = await owner_of(stores, scope, scope_id, org)
        target = scope_id or organization_id
        async with stores.database.transaction() as session:
            await lookup.lock_organization(session, organization_id=organization_id)
            present = await lifecycle.get_limits(session, organization_id=organization_id)
            limits = msgspec.structs.replace(present.get((scope, target), _NONE), **changes)
            sequence = await lifecycle.set_limits(session, scope, target, limits, organization_id=organization_id)
        change = KeyChange(sequence=sequence, organization_id=organization_id, key_id=None)
        return LimitRow(scope, target, *limits.as_tuple()), await announce(stores.redis, change)

    return on_stores(act)
