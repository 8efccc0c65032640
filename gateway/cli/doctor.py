"""`aap doctor`."""

from __future__ import annotations

import secrets
import time

import click

from gateway.cli.common import fail, json_option, print_json


@click.command()
@click.option("--new-pepper", is_flag=True, help="Only print a fresh value for AAP_KEY_PEPPERS.")
@json_option
def doctor_command(new_pepper: bool, as_json: bool) -> None:
    """Check settings, stores, clocks, limits and providers. Exit code 1 when something has failed."""
    if new_pepper:
        _print_new_pepper(as_json=as_json)
        return
    from gateway.cli.examine import examine
    from gateway.cli.stores import read_settings

    findings = examine(read_settings())
    if as_json:
        print_json(findings)
    else:
        for finding in findings:
            click.echo(f"{finding.result:<8} {finding.check:<22} {finding.detail}")
    failed = [finding.check for finding in findings if finding.result == "failed"]
    if failed:
        fail(f"failed: {', '.join(failed)}")


def _print_new_pepper(*, as_json: bool) -> None:
    pepper = f"p{int(time.time())}:{secrets.token_hex(32)}"
    if as_json:
        print_json({"pepper": pepper})
    else:
        click.echo(pepper)
