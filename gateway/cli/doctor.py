"""`aap doctor`."""

from __future__ import annotations

import secrets
import time
from base64 import b64encode

import click

from gateway.cli.common import fail, json_option, print_json


@click.command()
@click.option("--new-pepper", is_flag=True, help="Only print a fresh value for AAP_KEY_PEPPERS.")
@click.option("--new-sealing-key", is_flag=True, help="Only print a fresh value for AAP_SEALING_KEYS.")
@click.option("--new-signing-key", is_flag=True, help="Only print a fresh value for AAP_WEBHOOK_SIGNING_KEYS.")
@json_option
def doctor_command(new_pepper: bool, new_sealing_key: bool, new_signing_key: bool, as_json: bool) -> None:
    """Check settings, stores, clocks, limits and providers. Exit code 1 when something has failed."""
    if new_pepper or new_sealing_key or new_signing_key:
        _print_fresh(
            {
                **({"pepper": f"p{int(time.time())}:{secrets.token_hex(32)}"} if new_pepper else {}),
                **({"sealing_key": f"s{int(time.time())}:{secrets.token_hex(32)}"} if new_sealing_key else {}),
                **({"signing_key": f"whsk_{b64encode(secrets.token_bytes(32)).decode()}"} if new_signing_key else {}),
            },
            as_json=as_json,
        )
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


def _print_fresh(values: dict[str, str], *, as_json: bool) -> None:
    if as_json:
        print_json(values)
        return
    for value in values.values():
        click.echo(value)
