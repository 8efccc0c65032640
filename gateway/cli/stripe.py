"""`aap stripe`."""

from __future__ import annotations

from typing import Any

import click

from gateway.cli.common import fail, json_option, print_json, show

_CHANGE_COLUMNS = ("act", "kind", "name", "detail")
_DIFFERENCE_COLUMNS = ("organization_id", "meter", "hour", "ours", "theirs", "state", "checked_at")
_EVENT_COLUMNS = ("id", "type", "object_id", "state", "attempts", "problem", "occurred_at")
_TWIN_OPTIONS: dict[str, Any] = {"ignore_unknown_options": True}


@click.group()
def stripe_command() -> None:
    """Put plans up for sale at Stripe, tell it of usage, and see whether the two agree.

    STRIPE_API_KEY is the account's key. `aap stripe twin` is a stand-in for those who have none.
    """


@stripe_command.command("sync")
@click.option("--dry-run", is_flag=True, help="Only say what there is to do.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def sync(dry_run: bool, yes: bool, as_json: bool) -> None:
    """Make products, prices and meters at Stripe what aap.toml says. What is there already is not made again."""
    from gateway.cli import stripe_acts

    if as_json and not (yes or dry_run):
        raise click.UsageError("--json asks nothing: give --yes or --dry-run")
    planned = stripe_acts.synchronise(is_dry_run=True)
    empty = "Stripe has everything that aap.toml says."
    if not as_json or dry_run:
        show(planned, _CHANGE_COLUMNS, as_json=as_json, empty=empty)
    if dry_run:
        return
    if planned and not yes:
        click.confirm("Do that at Stripe?", abort=True)
    done = stripe_acts.synchronise(is_dry_run=False)
    if as_json:
        print_json(done)
    elif done:
        click.echo(f"Done: {len(done)} change{'' if len(done) == 1 else 's'}.")


@stripe_command.command("export")
@click.option("--org", help="Only this organization's usage.")
@click.option("--now", "is_flush", is_flag=True, help="Also of the hour that is not over.")
@json_option
def export(org: str | None, is_flush: bool, as_json: bool) -> None:
    """Report what was used and is not reported yet. The worker does this by itself every few seconds."""
    from gateway.cli import stripe_acts

    done = stripe_acts.export(org, is_flush=is_flush, shows_progress=not as_json)
    if as_json:
        print_json(done)
    else:
        click.echo(f"{done.acked} reports taken by Stripe, {done.open} open, {done.refused} refused.")
    if done.problem is not None:
        fail(f"Stripe has trouble: {done.problem}. What is left is sent later.")


@stripe_command.command("reconcile")
@click.option("--org", help="Only this organization.")
@click.option("--days", type=click.IntRange(1, 35), default=3, show_default=True, help="How far back.")
@click.option("--dry-run", is_flag=True, help="Repair nothing.")
@json_option
def reconcile(org: str | None, days: int, dry_run: bool, as_json: bool) -> None:
    """Compare subscriptions and hourly sums with Stripe's, and repair what is lost and not invoiced yet.

    A difference must be seen twice, ten minutes apart, before it is repaired. Exit code 1 when something differs.
    """
    from gateway.cli import stripe_acts

    found = stripe_acts.reconcile(org, days=days, may_repair=not dry_run)
    if as_json:
        print_json(found)
    else:
        show(found.differences, _DIFFERENCE_COLUMNS, as_json=False, empty="No hour differs.")
        counts = found.round
        click.echo(
            f"{counts.hours} hours compared: {counts.waiting} to be looked at again, {counts.repaired} repaired, "
            f"{counts.alerts} for you to look at. {found.subscriptions} subscriptions read."
        )
    if found.differences:
        fail("Stripe's sums are not ours everywhere")


@stripe_command.command("status")
@click.option("--org", help="Only this organization.")
@json_option
def status(org: str | None, as_json: bool) -> None:
    """Show what stands between the ledger and Stripe, from what is known here. Exit code 1 when something does."""
    from gateway.cli import stripe_acts

    found = stripe_acts.status(org)
    if as_json:
        print_json(found)
    else:
        _print_status(found)
    if not found.agrees:
        fail("something stands between the ledger and Stripe")


@stripe_command.command("accept")
@click.argument("org")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def accept(org: str, yes: bool, as_json: bool) -> None:
    """Say that you have decided about what stands between the ledger and Stripe of an organization.

    Alerts, differences of final invoices and usage that no invoice takes do not count any more, as they are now.
    Nothing is changed at Stripe: credit or charge the customer there first.
    """
    from gateway.cli import stripe_acts

    if as_json and not yes:
        raise click.UsageError("--json asks nothing: give --yes")
    if not yes:
        _print_status(stripe_acts.status(org))
        click.confirm("Have you decided about all of that?", abort=True)
    done = stripe_acts.accept(org)
    if as_json:
        print_json(done)
    else:
        click.echo(
            f"Accepted: {done.hours} hours, {done.invoices} invoices, {done.periods} periods without an invoice, "
            f"{done.windows} windows of uncollected usage, {done.subscriptions} subscriptions."
        )


@stripe_command.command("events")
@click.option("--state", type=click.Choice(["new", "applied", "ignored", "dead"]), help="Only those.")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@click.option("--replay", metavar="EVENT", help="Apply this event again.")
@click.option("--replay-dead", is_flag=True, help="Apply all again that were given up.")
@click.option("--dismiss", metavar="EVENT", help="Leave this event, which was given up, as it is.")
@json_option
def events(
    state: str | None, limit: int, replay: str | None, replay_dead: bool, dismiss: str | None, as_json: bool
) -> None:
    """List what Stripe told us, newest first, or have events applied again."""
    from gateway.cli import stripe_acts

    if dismiss is not None:
        stripe_acts.dismiss(dismiss)
        if as_json:
            print_json({"dismissed": 1})
        else:
            click.echo(f"{dismiss} does not count any more.")
        return
    if replay is not None or replay_dead:
        count = stripe_acts.replay(replay)
        if as_json:
            print_json({"replayed": count})
        else:
            click.echo(f"{count} will be applied again by the worker.")
        return
    show(stripe_acts.list_events(state, limit), _EVENT_COLUMNS, as_json=as_json, empty="There are no events.")


@stripe_command.command("resume")
@click.argument("org")
@json_option
def resume(org: str, as_json: bool) -> None:
    """Go on reporting an organization's usage after Stripe refused it, once the reason is gone."""
    from gateway.cli import stripe_acts

    count = stripe_acts.resume(org)
    if as_json:
        print_json({"resumed": count})
    else:
        click.echo(f"{count} meters go on.")


@stripe_command.command("twin", context_settings=_TWIN_OPTIONS)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@json_option
def twin(options: tuple[str, ...], as_json: bool) -> None:
    """Run a stand-in for Stripe, in memory: for trying billing without an account. Stripe is never contacted.

    --port 12111, --webhook URL and --webhook-secret SECRET are what it usually takes; `python -m metering.billing.twin
    --help` lists all of its options, and docs/stripe-twin.md says what it can do.
    """
    import msgspec

    from metering.billing.twin.__main__ import parse
    from metering.billing.twin.run import run

    run(msgspec.structs.replace(parse(list(options)), as_json=as_json))


def _print_status(found: Any) -> None:
    click.echo(f"Reports: {_counts(found.reports)}. Events: {_counts(found.events)}.")
    click.echo(f"Last reconciled: {found.reconciled_at or 'never'}.")
    show(found.differences, _DIFFERENCE_COLUMNS, as_json=False, empty="No hour differs.")
    for one in found.invoices:
        invoice = f"Invoice {one.invoice_id} bills" if one.invoice_id else f"No invoice of {one.organization_id} bills:"
        click.echo(f"{invoice} {one.invoiced} micro-USD of {one.reported} that were reported.")
    for one in found.uncollected:
        click.echo(
            f"No invoice takes {one.amount} (nano-USD or tokens) of {one.organization_id} from {one.window_starts_at}."
        )
    for one in found.usage_items:
        click.echo(f"{one.subscription_id or 'Subscriptions'} of {one.organization_id}: {one.reason}.")
    for one in found.parked:
        click.echo(f"Nothing is reported of {one.organization_id}: {one.reason}. See `aap stripe resume`.")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"
