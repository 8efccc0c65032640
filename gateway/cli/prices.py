"""`aap prices`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import click

from core.money import parse_usd, parse_usd_each
from gateway.cli.common import fail, json_option, print_json, show

_COLUMNS: Final = (
    *("model", "source", "input", "cached_input", "cache_write", "output", "image", "audio_second"),
    *("more", "effective_from", "id"),
)
_SET_COLUMNS: Final = ("price", "before", "now")
_CHANGE_COLUMNS: Final = ("model", "kind", "largest_change_percent", "input_before", "input", "output_before", "output")
_MISSING_COLUMNS: Final = ("model", "requests", "first_hour", "last_hour")
# Option → the dimension of `metering.usage.Units` that it prices. (A test compares them.)
TOKEN_OPTIONS: Final = {
    "--input": "input_tokens",
    "--output": "output_tokens",
    "--cached-input": "cached_input_tokens",
    "--cache-write": "cache_write_tokens",
    "--cache-write-1h": "cache_write_1h_tokens",
    "--reasoning": "reasoning_tokens",
    "--input-audio": "input_audio_tokens",
    "--output-audio": "output_audio_tokens",
    "--input-image": "input_image_tokens",
    "--output-image": "output_image_tokens",
}
EACH_OPTIONS: Final = {"--image": "images", "--audio-second": "audio_seconds"}


def _usd_per_million(text: str) -> int:
    """Return US dollars per million tokens as nano-USD per million."""
    try:
        amount = parse_usd(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    if amount < 0:
        raise click.BadParameter("a price cannot be below 0")
    return amount


def _usd_each(text: str) -> int:
    """Return US dollars for one as nano-USD per million."""
    try:
        return parse_usd_each(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _future(text: str) -> datetime:
    """Return a date, or a date with a time, that is still to come: in UTC, unless it names another offset."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter("expected a date such as 2027-01-31 or 2027-01-31T18:00+01:00") from None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    if when <= datetime.now(UTC):
        raise click.BadParameter("that has passed: a price holds from now on, or from later on")
    return when


@click.group()
def prices_command() -> None:
    """Show, set and import prices."""


@prices_command.command("list")
@click.option("--model", metavar="GLOB", help="Only models of this name, such as 'gpt-4o*'. Default: all.")
@click.option("--org", help="The prices of an organization's own. Default: everybody's.")
@click.option("--plan", help="The prices of a plan, which aap.toml sets.")
@click.option("--all-versions", is_flag=True, help="Also those that held before, and those that will.")
@json_option
def list_prices(model: str | None, org: str | None, plan: str | None, all_versions: bool, as_json: bool) -> None:
    """List prices, in US dollars: per million tokens, per picture, per second of sound.

    What the column "more" names is shown whole with --json: there, as rates in nano-USD per million units.
    """
    from gateway.cli import price_acts

    if org is not None and plan is not None:
        raise click.UsageError("--org and --plan contradict each other")
    versions = price_acts.list_all(model, org, plan, all_versions=all_versions)
    if as_json:
        print_json(versions)
        return
    rows = [price_acts.price_row(version) for version in versions]
    show(rows, _COLUMNS, as_json=False, empty="There is no such price. See `aap prices import`.")


def _rate_options(command: Any) -> Any:
    groups = ((TOKEN_OPTIONS, _usd_per_million, "per million tokens"), (EACH_OPTIONS, _usd_each, "for one"))
    for options, convert, unit in reversed(groups):
        for name, dimension in reversed(options.items()):
            words = dimension.replace("_", " ").capitalize()
            option = click.option(name, dimension, type=convert, metavar="USD", help=f"{words}: US dollars {unit}.")
            command = option(command)
    return command


@prices_command.command("set")
@click.argument("model")
@_rate_options
@click.option("--org", help="For this organization only: what it pays. Default: for everybody.")
@click.option("--from", "effective_from", type=_future, metavar="ISO-DATE", help="When it begins. Default: now.")
@json_option
def set_price(model: str, org: str | None, effective_from: datetime | None, as_json: bool, **given: int | None) -> None:
    """Set what MODEL, a name of the catalog, costs; show what was set for it before.

    What is left out has no price of its own: cached and written tokens, sound and pictures then cost what input or
    output costs. For an organization it is what it pays; what the provider takes is set without --org.
    """
    from gateway.cli import price_acts

    rates = {name: value for name, value in given.items() if value is not None}
    if not rates:
        raise click.UsageError("name a price, such as --input and --output")
    report = price_acts.set_price(model, rates, org, effective_from)
    if as_json:
        print_json(report)
        return
    show(price_acts.set_rows(report), _SET_COLUMNS, as_json=False, empty="")
    if report.effective_from > datetime.now(UTC):
        click.echo(f"Holds from {report.effective_from:%Y-%m-%d %H:%M} UTC on.")
    if not report.is_in_catalog:
        click.echo(f"There is no model {model} in the catalog: nobody can call it yet.")


@prices_command.command("import")
@click.option(
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A price list in LiteLLM's form. Default: that of the installed litellm.",
)
@click.option("--diff", "is_dry", is_flag=True, help="Only show what would change.")
@click.option("--all", "takes_all", is_flag=True, help="Import every model of the list. The default.")
@click.option("--models", "glob", metavar="GLOB", help="Import only models of this name, such as 'anthropic/*'.")
@click.option(
    "--accept-changes", is_flag=True, help="Also take prices that change by more than half. Without: they are listed."
)
@json_option
def import_prices(
    file: Path | None, is_dry: bool, takes_all: bool, glob: str | None, accept_changes: bool, as_json: bool
) -> None:
    """Import a price list. Prices that were set by hand go on winning over it.

    Importing the same list again changes nothing. A price that changed by more than half is not taken unasked: the
    others are, it is listed, and the exit code is 1.
    """
    from gateway.cli import price_acts

    if takes_all and glob is not None:
        raise click.UsageError("--all and --models contradict each other")
    report = price_acts.import_list(file, glob, is_dry=is_dry, accepts_all=accept_changes)
    if as_json:
        print_json(report)
    else:
        _print_import(report)
    if report.held_back and not is_dry:
        fail(
            f"{len(report.held_back)} prices changed by more than half and were not taken; --accept-changes takes them"
        )


def _print_import(report: Any) -> None:
    """Tell what was done, the list of changes first. New models are only counted, unless it is a rehearsal."""
    rows = [row for row in report.changes if report.is_dry or row.kind == "changed"]
    show(rows, _CHANGE_COLUMNS, as_json=False, empty="No known price changes.")
    would = "would be " if report.is_dry else ""
    click.echo(f"{report.file}: {report.models} prices, {report.imported} {would}imported.")
    for title, names in (
        ("Changed by more than half, not taken without --accept-changes", report.held_back),
        ("No longer in the list; the last price goes on holding", report.vanished),
        (
            "Not taken, since these parts of the price are not understood; set them with `aap prices set`",
            [f"{model}: {', '.join(fields)}" for model, fields in report.incomplete.items()],
        ),
    ):
        if names:
            click.echo(f"{title}:", err=True)
            for name in names:
                click.echo(f"  {name}", err=True)


@prices_command.command("missing")
@json_option
def list_missing(as_json: bool) -> None:
    """List the models that were used without a price. Their calls stand in the ledger at 0."""
    from gateway.cli import price_acts

    show(price_acts.missing(), _MISSING_COLUMNS, as_json=as_json, empty="Every call had a price.")
