"""`aap budgets`: how much may be charged."""

from __future__ import annotations

from typing import Literal, get_args

import click

from gateway.cli.common import confirmed, json_option, org_option, print_json, require_confirmed, show
from keys.dimensions import BudgetPeriod, SettableScope

_COLUMNS = ("budget", "scope", "id", "period", "limit_usd", "spent_usd", "kind", "renewed_at")
_EVENT_COLUMNS = (
    *("created_at", "budget", "scope", "id", "period"),
    *("period_began", "threshold_percent", "spent_usd", "limit_usd"),
)
_scope = click.argument("scope", type=click.Choice(get_args(SettableScope)))
_scope_id = click.argument("scope_id", required=False)
_period = click.option(
    "--period", type=click.Choice(get_args(BudgetPeriod)), default="month", show_default=True, help="In UTC."
)


@click.group()
def budgets_command() -> None:
    """Show and set budgets: how much may be charged."""


@budgets_command.command("list")
@org_option
@json_option
def list_budgets(org: str | None, as_json: bool) -> None:
    """List an organization's budgets and what was spent of each in its present period."""
    from gateway.cli import budget_acts

    show(budget_acts.list_all(org), _COLUMNS, as_json=as_json, empty="There are no budgets.")


@budgets_command.command("set")
@_scope
@_scope_id
@_period
@click.option("--limit", "limit_usd", required=True, help="US dollars, such as 25 or 0.50.")
@click.option(
    "--hard/--soft",
    "is_hard",
    default=True,
    show_default="hard",
    help="A hard budget refuses what may not fit. A soft one only tells when it is half, 80 % and fully used.",
)
@org_option
@json_option
def set_budget(
    scope: SettableScope,
    scope_id: str | None,
    period: BudgetPeriod,
    limit_usd: str,
    is_hard: bool,
    org: str | None,
    as_json: bool,
) -> None:
    """Make a budget for an organization, project or key, or change the one it has for that period.

    SCOPE_ID is the project's or key's id; for the organization it may be left out. What was spent in the present period
    counts. Exit code 1 when a gateway has not confirmed it in time: the budget holds there within 5 seconds.
    """
    from gateway.cli import budget_acts

    _require_id(scope, scope_id)
    row = budget_acts.change(scope, scope_id, period, limit_usd, is_hard=is_hard, org=org)
    if as_json:
        print_json(row)
    else:
        show([row], _COLUMNS, as_json=False, empty="")
        click.echo(f"{confirmed(row.propagation)}.")
    require_confirmed(row.propagation)


@budgets_command.command("clear")
@_scope
@_scope_id
@_period
@org_option
@json_option
def clear_budget(
    scope: SettableScope, scope_id: str | None, period: BudgetPeriod, org: str | None, as_json: bool
) -> None:
    """Delete a budget: from then on nothing is refused by it.

    Exit code 1 when a gateway has not confirmed it in time.
    """
    from gateway.cli import budget_acts

    _require_id(scope, scope_id)
    propagation = budget_acts.delete(scope, scope_id, period, org)
    if as_json:
        print_json({"deleted": True, "propagation": propagation})
    else:
        click.echo(f"The budget is gone; {confirmed(propagation)}.")
    require_confirmed(propagation)


@budgets_command.command("events")
@org_option
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many, newest first.")
@json_option
def list_events(org: str | None, limit: int, as_json: bool) -> None:
    """List the thresholds (50, 80, 100 %) that spending has crossed."""
    from gateway.cli import budget_acts

    rows = budget_acts.events(org, limit)
    show(rows, _EVENT_COLUMNS, as_json=as_json, empty="No budget has been used to 50 % yet.")


def _require_id(scope: Literal["organization", "project", "key"], scope_id: str | None) -> None:
    if scope_id is None and scope != "organization":
        raise click.UsageError(f"name the {scope}")
