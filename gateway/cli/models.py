"""`aap models` and `aap import`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click
import msgspec

from gateway.cli.common import fail, json_option, print_json, show


class _Row(msgspec.Struct, frozen=True):
    model: str
    deployment: str
    kind: str
    weight: int


@click.command()
@json_option
def models_command(as_json: bool) -> None:
    """List the models of the catalog and their deployments."""
    from core.configuration import ConfigurationInvalid
    from gateway.catalog_file import CatalogFile
    from gateway.cli.stores import read_settings

    settings = read_settings()
    try:
        catalog = CatalogFile(settings.config_path, os.environ).catalog
    except ConfigurationInvalid as error:
        fail(f"{settings.config_path.name} is not valid:\n  " + "\n  ".join(error.problems))
    rows = [
        _Row(model.name, deployment.id, deployment.provider.settings.kind, deployment.weight)
        for model in catalog
        for deployment in model.deployments
    ]
    show(rows, ("model", "deployment", "kind", "weight"), as_json=as_json, empty="")


@click.group()
def import_command() -> None:
    """Convert another gateway's configuration."""


@import_command.command("litellm")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Where to write. Default: only show what would be.")
@click.option("--force", is_flag=True, help="Replace the output file if it is there.")
@json_option
def import_litellm(file: Path, output: Path | None, force: bool, as_json: bool) -> None:
    """Convert the `model_list` of a LiteLLM config into the tables of aap.toml.

    Secrets that stand in the file are not copied: they become references to environment variables that are named.
    """
    from gateway.cli.litellm_import import convert, read_litellm

    try:
        report = convert(read_litellm(file))
    except ValueError as error:
        fail(f"{file.name}: {error}")
    if output is not None:
        if output.exists() and not force:
            fail(f"{output} is there already; --force replaces it")
        output.write_text(report.toml, encoding="utf-8")
    if as_json:
        print_json(report)
        return
    _print_report(report, output)


def _print_report(report: Any, output: Path | None) -> None:
    if output is None:
        click.echo(report.toml)
    click.echo(f"{report.models} models taken.", err=True)
    for title, lines in (
        ("Set these variables", report.variables),
        ("To look at", report.notes),
        ("Not taken over", report.ignored),
    ):
        if lines:
            click.echo(f"{title}:", err=True)
            for line in lines:
                click.echo(f"  {line}", err=True)
    if output is not None:
        click.echo(f"Written to {output}.", err=True)
