"""`aap wallet`."""

from __future__ import annotations

import click

from gateway.cli.common import json_option, print_json, show

_COLUMNS = ("created_at", "kind", "amount_usd", "note", "id")


@click.group()
def wallet_command() -> None:
    """Show and add prepaid credit."""


@wallet_command.command("show")
@click.argument("org")
@json_option
def show_wallet(org: str, as_json: bool) -> None:
    """Show an organization's credit and its last movements."""
    from gateway.cli import wallet_acts

    found = wallet_acts.show(org)
    if as_json:
        print_json(found)
        return
    click.echo(f"{found.available_usd} US dollars left, {found.balance_usd} booked.")
    show(found.transfers, _COLUMNS, as_json=False, empty="Nothing has moved yet.")


@wallet_command.command("add", context_settings={"ignore_unknown_options": True})
@click.argument("org")
@click.argument("usd")
@click.option(
    "--reference", required=True, help="What it is for: the same reference adds once, however often it is said."
)
@click.option("--note", help="For the organization to see.")
@json_option
def add(org: str, usd: str, reference: str, note: str | None, as_json: bool) -> None:
    """Add US dollars to an organization's credit, or take some (-5.00), without a payment at Stripe."""
    from gateway.cli import wallet_acts

    done = wallet_acts.add(org, usd, reference, note)
    if as_json:
        print_json(done)
    elif done.is_new:
        verb = "taken" if usd.startswith("-") else "added"
        click.echo(f"{usd.removeprefix('-')} US dollars {verb}: {done.available_usd} left.")
    else:
        click.echo(f"That reference was added before. {done.available_usd} left.")
