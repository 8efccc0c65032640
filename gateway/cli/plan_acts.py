"""What `aap plans usage` does."""

from __future__ import annotations

import os

import msgspec

from core.clock import SystemClock
from core.ids import OrganizationId
from gateway.catalog_file import CatalogFile
from gateway.cli.stores import Stores, on_stores
from keys import tenants
from keys.plans import PlanLimits
from metering.allowances import AllowanceStanding, list_allowances


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What an organization has used of its plan this month. *plan* is None without one: nothing is limited then."""

    organization_id: str
    plan: str | None
    allowances: list[AllowanceStanding]


def usage(org: str) -> Usage:
    """Return what the organization has used of every unit."""

    async def act(stores: Stores) -> Usage:
        plans = CatalogFile(stores.settings.config_path, os.environ).plans
        organization_id = OrganizationId(org)
        async with stores.database.transaction() as session:
            organization = await tenants.get_organization(session, organization_id=organization_id)
            plan = plans.find(organization.plan)
            limits = plan.limits if plan else PlanLimits()
            found = await list_allowances(session, limits, SystemClock().now(), organization_id=organization_id)
        return Usage(organization_id=organization_id, plan=organization.plan, allowances=found)

    return on_stores(act)
