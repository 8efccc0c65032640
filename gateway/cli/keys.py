"""`aap keys`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import click
import msgspec
from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import KeyId, OrganizationId, ProjectId
from gateway.cli.common import Stores, fail, json_option, on_stores, print_json, show
from gateway.cli.tenants import chosen_organization, org_option
from keys import lifecycle, tenants
from keys.errors import TenantNotFound
from keys.lifecycle import IssuedKey, Key, NewKey
from keys.revocation import KeyChange, Propagation, announce
from keys.scopes import ALL_SCOPES

_COLUMNS = ("id", "name", "hint", "project_id", "scopes", "models", "expires_at", "disabled_at", "last_used_at")


class _Shown(msgspec.Struct, frozen=True):
    id: str
    secret: str
    propagation: Propagation


@click.group()
def keys_command() -> None:
    """Create, list, rotate and revoke API keys."""


@keys_command.command("create")
@click.argument("name")
@org_option
@click.option("--project", help="The project's id. Needed only when there are several.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(ALL_SCOPES), help="What it may do. Default: all.")
@click.option("--model", "models", multiple=True, help="A model it may use. Default: all.")
@click.option("--ip", "networks", multiple=True, help="A network it works from, such as 192.0.2.0/24. Default: all.")
@click.option("--expires-in-days", type=click.IntRange(1, 36_500), help="When it ends. Default: never.")
@json_option
def create_key(
    name: str,
    org: str | None,
    project: str | None,
    scopes: tuple[str, ...],
    models: tuple[str, ...],
    networks: tuple[str, ...],
    expires_in_days: int | None,
    as_json: bool,
) -> None:
    """Create a key. Its secret is printed once and kept nowhere."""
    expires_at = datetime.now(UTC) + timedelta(days=expires_in_days) if expires_in_days else None
    try:
        new = NewKey(
            name=name,
            scopes=scopes or ALL_SCOPES,
            models=models or None,
            ip_networks=networks or None,
            expires_at=expires_at,
        )
    except ValueError as error:
        fail(str(error))

    async def act(stores: Stores) -> _Shown:
        organization_id = await chosen_organization(stores, org)
        project_id = await _chosen_project(stores, project, organization_id)

        async def create(session: AsyncSession) -> IssuedKey:
            return await lifecycle.create_key(
                session, new, organization_id=organization_id, project_id=project_id, pepper=stores.pepper
            )

        return await _issue(stores, organization_id, create)

    _print_issued(on_stores(act), as_json=as_json)


@keys_command.command("list")
@org_option
@json_option
def list_keys(org: str | None, as_json: bool) -> None:
    """List the keys of an organization."""

    async def act(stores: Stores) -> list[Key]:
        organization_id = await chosen_organization(stores, org)
        async with stores.database.transaction() as session:
            return await lifecycle.list_keys(session, organization_id=organization_id)

    show(on_stores(act), _COLUMNS, as_json=as_json, empty="There is no key yet.")


@keys_command.command("rotate")
@click.argument("key_id")
@click.option(
    "--grace-hours",
    type=click.FloatRange(0, 24 * 90),
    default=24.0,
    show_default=True,
    help="How long the old secret goes on working. 0 ends it at once.",
)
@json_option
def rotate_key(key_id: str, grace_hours: float, as_json: bool) -> None:
    """Give a key a new secret. Its id, limits and history stay."""

    async def act(stores: Stores) -> _Shown:
        organization_id = await _owner(stores, key_id)

        async def rotate(session: AsyncSession) -> IssuedKey:
            return await lifecycle.rotate_key(
                session,
                KeyId(key_id),
                organization_id=organization_id,
                grace=timedelta(hours=grace_hours),
                pepper=stores.pepper,
                now=datetime.now(UTC),
            )

        return await _issue(stores, organization_id, rotate)

    _print_issued(on_stores(act), as_json=as_json)


@keys_command.command("revoke")
@click.argument("key_id")
@json_option
def revoke_key(key_id: str, as_json: bool) -> None:
    """End a key at once, everywhere. Exit code 1 when a gateway has not confirmed it in time."""

    async def act(stores: Stores) -> Propagation:
        organization_id = await _owner(stores, key_id)
        async with stores.database.transaction() as session:
            change = await lifecycle.revoke_key(
                session, KeyId(key_id), organization_id=organization_id, now=datetime.now(UTC)
            )
        return await announce(
            stores.redis, KeyChange(sequence=change, organization_id=organization_id, key_id=KeyId(key_id))
        )

    propagation = on_stores(act)
    if as_json:
        print_json({"id": key_id, "revoked": True, "propagation": propagation})
    else:
        count = len(propagation.acknowledged)
        click.echo(f"Revoked {key_id}; {count} running API process{'' if count == 1 else 'es'} confirmed it.")
    if not propagation.is_complete:
        fail(f"not confirmed by {', '.join(propagation.missing)}: there it ends within 5 seconds")


async def _owner(stores: Stores, key_id: str) -> OrganizationId:
    async with stores.database.transaction() as session:
        return await lifecycle.find_key_owner(session, KeyId(key_id))


async def _chosen_project(stores: Stores, project: str | None, organization_id: OrganizationId) -> ProjectId:
    if project is not None:
        return ProjectId(project)
    async with stores.database.transaction() as session:
        found = await tenants.list_projects(session, organization_id=organization_id)
    if len(found) != 1:
        raise TenantNotFound("project (there are several: name one)" if found else "project")
    return found[0].id


async def _issue(
    stores: Stores, organization_id: OrganizationId, act: Callable[[AsyncSession], Awaitable[IssuedKey]]
) -> _Shown:
    async with stores.database.transaction() as session:
        issued = await act(session)
    change = KeyChange(sequence=issued.change, organization_id=organization_id, key_id=issued.id)
    return _Shown(issued.id, issued.secret, await announce(stores.redis, change))


def _print_issued(shown: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(shown)
        return
    click.echo(f"id      {shown.id}\nsecret  {shown.secret}   (shown this once)")
    if not shown.propagation.is_complete:
        missing = ", ".join(shown.propagation.missing)
        click.echo(f"Not confirmed by {missing}: there the change holds within 5 seconds.", err=True)
