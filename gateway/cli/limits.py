"""`aap limits`."""

from __future__ import annotations

import os
from typing import Any

import click
import msgspec

from core.ids import OrganizationId
from gateway.catalog_file import CatalogFile
from gateway.cli.common import Stores, fail, json_option, on_stores, print_json, show
from gateway.cli.tenants import chosen_organization, org_option
from keys import lifecycle
from keys.limits import DIMENSIONS, LIMIT_MAX, LimitScope, RateLimits
from keys.revocation import KeyChange, announce

_COLUMNS = ("scope", "id", *DIMENSIONS)


class _Row(msgspec.Struct, frozen=True):
    scope: str
    id: str
    requests_per_minute: int | None
    requests_per_day: int | None
    tokens_per_minute: int | None
    tokens_per_day: int | None
    concurrent_requests: int | None


@click.group()
def limits_command() -> None:
    """Show and set rate limits."""


@limits_command.command("show")
@org_option
@json_option
def show_limits(org: str | None, as_json: bool) -> None:
    """Show the limits that were set, and the defaults that hold elsewhere."""

    async def act(stores: Stores) -> list[_Row]:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            found = await lifecycle.get_limits(session, organization_id=organization_id)
        defaults = CatalogFile(stores.settings.config_path, os.environ).limits
        rows = [_Row(scope, scope_id, *limits.as_tuple()) for (scope, scope_id), limits in sorted(found.items())]
        rows += [
            _Row(f"default {scope}", "*", *getattr(defaults, scope).as_tuple())
            for scope in ("organization", "project", "key")
        ]
        rows += [_Row("default model", name, *limits.as_tuple()) for name, limits in defaults.model.items()]
        return rows

    show(on_stores(act), _COLUMNS, as_json=as_json, empty="")


def _limit_options(command: Any) -> Any:
    for name in reversed(DIMENSIONS):
        option = click.option(
            f"--{name.replace('_', '-')}",
            type=click.IntRange(1, LIMIT_MAX),
            help=f"{name.replace('_', ' ').capitalize()}. Left out: no limit of its own.",
        )
        command = option(command)
    return command


@limits_command.command("set")
@click.argument("scope", type=click.Choice(["organization", "project", "key", "model"]))
@click.argument("scope_id", required=False)
@org_option
@_limit_options
@json_option
def set_limits(scope: LimitScope, scope_id: str | None, org: str | None, as_json: bool, **given: int | None) -> None:
    """Replace the limits of an organization, project, key or model. Every gateway knows within a second.

    SCOPE_ID is the project's or key's id or the model's name; for the organization it may be left out.
    """
    if scope_id is None and scope != "organization":
        fail(f"name the {scope}")

    async def act(stores: Stores) -> _Row:
        organization_id: OrganizationId = await chosen_organization(stores, org)
        target = scope_id or organization_id
        limits = RateLimits(**given)
        async with stores.database.transaction() as session:
            change = await lifecycle.set_limits(session, scope, target, limits, organization_id=organization_id)
        await announce(stores.redis, KeyChange(sequence=change, organization_id=organization_id, key_id=None))
        return _Row(scope, target, *limits.as_tuple())

    row = on_stores(act)
    if as_json:
        print_json(row)
    else:
        show([row], _COLUMNS, as_json=False, empty="")
