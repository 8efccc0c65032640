"""`aap plans`: what is sold, and what of it an organization has used."""

from __future__ import annotations

import os
from typing import Any

import click
import msgspec

from gateway.cli.common import fail, json_option, print_json, show
from keys.plans import PLAN_LIMITS

_COLUMNS = ("plan", "title", "usd_per_month", "trial_days", "is_default", *PLAN_LIMITS)
_USAGE_COLUMNS = ("unit", "used", "limit", "renews_at")


class _Row(msgspec.Struct, frozen=True, kw_only=True):
    plan: str
    title: str
    usd_per_month: str
    trial_days: int
    is_default: bool
    chat_requests_per_month: int | None
    workflow_executions_per_month: int | None
    tokens_per_month: int | None
    storage_gigabytes: int | None
    concurrent_workflows: int | None
    agents: int | None


@click.group(invoke_without_command=True)
@json_option
@click.pass_context
def plans_command(context: click.Context, as_json: bool) -> None:
    """List the plans of aap.toml and what each includes; a limit that is not there (-) is none."""
    if context.invoked_subcommand is None:
        show(
            _rows(),
            _COLUMNS,
            as_json=as_json,
            empty="There are no plans, and nothing is limited by one. `aap plans example` shows three.",
        )


@plans_command.command("example")
@json_option
def print_example(as_json: bool) -> None:
    """Print three plans as tables for aap.toml: free, pro, enterprise."""
    from metering.billing.plans import EXAMPLE

    if as_json:
        print_json({"toml": EXAMPLE})
    else:
        click.echo(EXAMPLE, nl=False)


@plans_command.command("usage")
@click.argument("org")
@json_option
def show_usage(org: str, as_json: bool) -> None:
    """Show what an organization has used of its plan this month, in UTC. Calls that still run are not in it."""
    from gateway.cli import plan_acts

    usage = plan_acts.usage(org)
    if as_json:
        print_json(usage)
        return
    click.echo(f"Plan: {usage.plan or 'none'}")
    show(usage.allowances, _USAGE_COLUMNS, as_json=False, empty="")


def _rows() -> list[Any]:
    from core.configuration import ConfigurationInvalid
    from gateway.catalog_file import CatalogFile
    from gateway.cli.stores import read_settings

    settings = read_settings()
    try:
        plans = CatalogFile(settings.config_path, os.environ).plans
    except ConfigurationInvalid as error:
        fail(f"{settings.config_path.name} is not valid:\n  " + "\n  ".join(error.problems))
    return [
        _Row(
            plan=plan.name,
            title=plan.title,
            usd_per_month=f"{plan.price_cents_per_month // 100}.{plan.price_cents_per_month % 100:02d}",
            trial_days=plan.trial_days,
            is_default=plan.name == plans.billing.default_plan,
            **{name: getattr(plan.limits, name) for name in PLAN_LIMITS},
        )
        for plan in plans
    ]
