"""`aap ledger`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import click

from core.money import NanoUsd, parse_usd
from gateway.cli.common import fail, json_option, org_option, print_json, show
from gateway.cli.usage import range_options

_DRIFT_COLUMNS = ("what", "where", "expected", "found")
_REDIS_COLUMNS = ("scope", "scope_id", "spent_usd", "spent_in_redis_usd", "reserved_usd", "held_usd", "without_call")
_ALLOWANCE_COLUMNS = ("organization_id", "unit", "used", "used_in_redis", "reserved", "held", "without_call")
_reason_option = click.option(
    "--reason", required=True, help="Why: one line, kept with the entry. Customers do not see it."
)
_yes_option = click.option("--yes", "is_sure", is_flag=True, help="Do not ask.")


def _usd(text: str) -> NanoUsd:
    try:
        return parse_usd(text.removeprefix("+").removeprefix("$"))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.group()
def ledger_command() -> None:
    """Export, check and correct the ledger."""


@ledger_command.command("export")
@org_option
@click.option("--format", "form", type=click.Choice(["csv", "jsonl"]), default="csv", show_default=True, help="Form.")
@range_options
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A file. Default: standard output.")
@json_option
def export_ledger(
    org: str | None,
    form: Literal["csv", "jsonl"],
    since: datetime | None,
    to: datetime | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Write an organization's entries, oldest first, with exact amounts in US dollars.

    They hold all that is known, what providers take among it; customers see less. Without --from they begin with the
    first one, without --to they end with the newest. A file has its name only when it is whole.
    """
    from gateway.cli import ledger_acts

    first, last = (None if day is None else day.replace(tzinfo=UTC) for day in (since, to))
    if first is not None and last is not None and first >= last:
        raise click.UsageError("--from must be earlier than --to")
    written = ledger_acts.export_to(output, form, org, first, last)
    if output is not None and as_json:
        print_json({"output": str(output), "bytes": written})
    elif output is not None:
        click.echo(f"Wrote {written} bytes to {output}.", err=True)


@ledger_command.command("verify")
@click.option("--no-rates", is_flag=True, help="Do not rate every call once more: the sums only.")
@json_option
def verify_ledger(no_rates: bool, as_json: bool) -> None:
    """Work out anew, for all organizations, what must agree: entries, windows, budgets, running calls, prices.

    Nothing is changed. Exit code 1 when something does not agree. Calls may go on meanwhile: what is read is the state
    of one moment. Hard budgets and allowances in Redis are shown beside it, and may differ for moments while calls run.
    """
    from gateway.cli import ledger_verify

    report = ledger_verify.verify_all(rerate=not no_rates)
    if as_json:
        print_json(report)
    else:
        _print_verification(report)
    if report.drifts:
        fail(f"{len(report.drifts)} things do not agree")


def _print_verification(report: Any) -> None:
    click.echo(
        f"Looked at {report.entries} entries ({report.rated} rated once more), {report.windows} windows,"
        f" {report.budgets} budget periods, {report.intents} running calls."
    )
    show(report.drifts, _DRIFT_COLUMNS, as_json=False, empty="Everything agrees.")
    if report.budgets_in_redis is None:
        click.echo("Redis did not answer: hard budgets and allowances there were not looked at.", err=True)
    elif differing := [row for row in report.budgets_in_redis if not row.agrees]:
        click.echo("Hard budgets in Redis that differ; while calls run they may, for moments:")
        show(differing, _REDIS_COLUMNS, as_json=False, empty="")
    if differing := [row for row in report.allowances_in_redis or () if not row.agrees]:
        click.echo("Allowances in Redis that differ; while calls run they may, for moments:")
        show(differing, _ALLOWANCE_COLUMNS, as_json=False, empty="")


@ledger_command.command("adjust")
@click.argument("request_id")
@click.option("--charge", type=_usd, metavar="USD", required=True, help="What is added to the charge: +0.25, -1.50.")
@click.option("--cost", type=_usd, metavar="USD", default="0", help="What is added to the cost. Default: nothing.")
@_reason_option
@_yes_option
@json_option
def adjust_call(request_id: str, charge: NanoUsd, cost: NanoUsd, reason: str, is_sure: bool, as_json: bool) -> None:
    """Correct what one call is charged: by an entry of its own, which counts when the call began.

    REQUEST_ID is the x-request-id of the call's answer. Budgets know at once, gateways within seconds.
    """
    from gateway.cli import ledger_corrections

    sure = None if is_sure else _asking(as_json=as_json)
    _print_booked(ledger_corrections.adjust_call(request_id, charge, cost, reason, sure), as_json=as_json)


@ledger_command.command("credit")
@click.option("--amount", type=_usd, metavar="USD", required=True, help="How much: 25 or 0.50.")
@org_option
@click.option("--project", help="A project, whose budgets it counts in too.")
@click.option("--key", help="A key, whose budgets and project's budgets it counts in too.")
@_reason_option
@_yes_option
@json_option
def credit_organization(amount: NanoUsd, reason: str, is_sure: bool, as_json: bool, **owner: str | None) -> None:
    """Give an organization an amount back, in the present periods of its budgets."""
    from gateway.cli import ledger_corrections

    sure = None if is_sure else _asking(as_json=as_json)
    _print_booked(ledger_corrections.credit_organization(amount, owner, reason, sure), as_json=as_json)


def _asking(*, as_json: bool) -> Any:
    """Return what asks an operator, who is shown what would be done."""

    def ask(planned: str) -> None:
        click.echo(planned, err=True)
        click.confirm("Enter it?", abort=True, err=True)

    if as_json:
        raise click.UsageError("with --json nobody is asked: say --yes")
    return ask


def _print_booked(booked: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(booked)
        return
    show(
        [booked], ("id", "kind", "organization_id", "model", "cost_usd", "charge_usd", "note"), as_json=False, empty=""
    )
