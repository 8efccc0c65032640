"""What `aap ledger adjust` and `aap ledger credit` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime

import msgspec

from core.ids import KeyId, OrganizationId, ProjectId
from core.money import NanoUsd, usd_text
from gateway.cli.stores import Stores, chosen_organization, on_stores
from keys.lifecycle import find_key_owner
from metering.adjustments import Booked, CallStanding, adjust, credit, standing

Ask = Callable[[str], None]
"""Shows an operator what would be done, and returns if it is to be done."""


class BookedLine(msgspec.Struct, frozen=True, kw_only=True):
    """An entry that was made. Money is exact, in US dollars."""

    id: str
    request_id: str
    kind: str
    seq: int
    organization_id: str
    project_id: str
    key_id: str
    model: str
    cost_usd: str
    charge_usd: str
    occurred_at: datetime
    note: str


def adjust_call(request_id: str, charge: NanoUsd, cost: NanoUsd, reason: str, ask: Ask | None) -> BookedLine:
    """Correct what a call is charged, once the operator is sure."""

    async def act(stores: Stores) -> BookedLine:
        async with stores.database.transaction() as session:
            present = await standing(session, request_id)
        # Not while a transaction is open: people think.
        if ask is not None:
            ask(_planned_adjustment(present, charge, cost, reason))
        async with stores.database.transaction() as session:
            return _line(await adjust(session, request_id, charge_nano_usd=charge, cost_nano_usd=cost, reason=reason))

    return on_stores(act)


def credit_organization(amount: NanoUsd, owner: Mapping[str, str | None], reason: str, ask: Ask | None) -> BookedLine:
    """Give an amount back, once the operator is sure. *owner* names org, project and key, as far as they are told."""

    async def act(stores: Stores) -> BookedLine:
        organization_id = await _organization(stores, owner)
        project, key = owner.get("project"), owner.get("key")
        if ask is not None:
            whose = ", ".join(name for name in (organization_id, project, key) if name)
            ask(f"A credit of {usd_text(amount)} USD for {whose}: {reason}")
        async with stores.database.transaction() as session:
            booked = await credit(
                session,
                amount,
                organization_id=organization_id,
                project_id=None if project is None else ProjectId(project),
                key_id=None if key is None else KeyId(key),
                reason=reason,
            )
        return _line(booked)

    return on_stores(act)


async def _organization(stores: Stores, owner: Mapping[str, str | None]) -> OrganizationId:
    key = owner.get("key")
    if owner.get("org") is None and key is not None:
        async with stores.database.transaction() as session:
            return await find_key_owner(session, KeyId(key))
    return await chosen_organization(stores, owner.get("org"))


def _planned_adjustment(call: CallStanding, charge: NanoUsd, cost: NanoUsd, reason: str) -> str:
    owners = f"{call.organization_id}, {call.project_id}, {call.key_id}"
    lines = [f"{call.request_id}: {call.model}, {call.occurred_at:%Y-%m-%d %H:%M} UTC, {owners}"]
    for name, present, change in (("charge", call.charge_nano_usd, charge), ("cost", call.cost_nano_usd, cost)):
        sign = "-" if change < 0 else "+"
        lines.append(f"  {name} {usd_text(present)} {sign} {usd_text(abs(change))} = {usd_text(present + change)} USD")
    return "\n".join([*lines, f"  {reason}"])


def _line(booked: Booked) -> BookedLine:
    named = msgspec.structs.asdict(booked)
    cost, charge = named.pop("cost_nano_usd"), named.pop("charge_nano_usd")
    return BookedLine(
        id=f"{booked.request_id}_{booked.kind}_{booked.seq}",
        cost_usd=usd_text(cost),
        charge_usd=usd_text(charge),
        **named,
    )
