"""`aap serve`, `worker`, `migrate`, `version`."""

from __future__ import annotations

import sys

import click
import msgspec

from core.version import VERSION
from gateway.cli.common import json_option, print_json


@click.command()
@click.option("--host", help="Address to listen on. [AAP_HOST, default 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on. [AAP_PORT, default 8080]")
@click.option("--workers", type=int, help="Number of API processes. [AAP_WORKERS, default: cores, at most 4]")
@click.option("--data-dir", help="Where embedded stores keep their data. [AAP_DATA_DIR, default .data]")
@click.option("--no-worker", is_flag=True, help="Start API processes only; `aap worker` runs elsewhere.")
@json_option
def serve_command(
    host: str | None, port: int | None, workers: int | None, data_dir: str | None, no_worker: bool, as_json: bool
) -> None:
    """Run the gateway: stores, schema, API processes, worker. Ctrl-C drains and stops it; twice, at once.

    With --json one line is printed when calls can be answered: base_url, api_key (on the first start only, else null)
    and models.
    """
    from gateway.cli.serve import serve

    given = {"AAP_HOST": host, "AAP_PORT": port, "AAP_WORKERS": workers, "AAP_DATA_DIR": data_dir}
    serve(given, with_worker=not no_worker, as_json=as_json)


@click.command()
@json_option
def worker_command(as_json: bool) -> None:
    """Run the worker processes only, on the stores of DATABASE_URL and REDIS_URL. They print nothing but their log."""
    from gateway.cli.serve import work

    del as_json  # Errors are told by `fail`, which looks it up.
    work()


@click.command()
@json_option
def migrate_command(as_json: bool) -> None:
    """Bring the database schema up to date. Safe to run twice, and from several machines at once."""
    from gateway.cli.migrate import migrate

    revision = migrate()
    if as_json:
        print_json({"revision": revision})
    else:
        click.echo(f"The schema is at revision {revision}.")


@click.command()
@json_option
def version_command(as_json: bool) -> None:
    """Print the version."""
    if as_json:
        print_json({"version": VERSION, "python": sys.version.split()[0], "msgspec": msgspec.__version__})
    else:
        click.echo(VERSION)
