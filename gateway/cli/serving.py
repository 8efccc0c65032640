"""`aap serve`, `worker`, `migrate`, `version`."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from typing import Any

import click
import msgspec

from core import embedded
from core.configuration import ConfigurationInvalid
from core.database import DOWN, Database
from core.embedded import EmbeddedUnavailable
from core.settings import Settings
from core.telemetry import configure_logs
from core.version import VERSION
from gateway.catalog_file import CatalogFile
from gateway.cli.common import fail, json_option, print_json, read_settings
from gateway.first_run import FirstKey
from keys.secrets import redact


def _with_options(settings: Settings, given: dict[str, Any]) -> Settings:
    """Return *settings* with the options that were given, also for the processes that are started later."""
    names = {"host": "AAP_HOST", "port": "AAP_PORT", "workers": "AAP_WORKERS", "data_dir": "AAP_DATA_DIR"}
    for option, value in given.items():
        if value is not None:
            os.environ[names[option]] = str(value)
    return read_settings() if any(value is not None for value in given.values()) else settings


@click.command()
@click.option("--host", help="Address to listen on. [AAP_HOST, default 127.0.0.1]")
@click.option("--port", type=int, help="Port to listen on. [AAP_PORT, default 8080]")
@click.option("--workers", type=int, help="Number of API processes. [AAP_WORKERS, default: cores, at most 4]")
@click.option("--data-dir", help="Where embedded stores keep their data. [AAP_DATA_DIR, default .data]")
@click.option("--no-worker", is_flag=True, help="Start API processes only; `aap worker` runs elsewhere.")
def serve_command(
    host: str | None, port: int | None, workers: int | None, data_dir: str | None, no_worker: bool
) -> None:
    """Run the gateway: stores, schema, API processes, worker. Ctrl-C drains and stops it; twice, at once."""
    from gateway.supervisor import PortTaken, ProcessFailed, serve  # noqa: PLC0415 - not for `--help`
    from inference.upstreams.http1_proxies import ProxyInvalid  # noqa: PLC0415

    options = {"host": host, "port": port, "workers": workers, "data_dir": data_dir}
    settings = _with_options(read_settings(), options)
    configure_logs(settings.log, redact)
    try:
        serve(settings, with_worker=not no_worker, welcome=lambda key, catalog: _welcome(settings, key, catalog))
    except PortTaken as error:
        fail(f"{error}. Choose another with --port.")
    except (EmbeddedUnavailable, ProcessFailed, ProxyInvalid) as error:
        fail(str(error))
    except ConfigurationInvalid as error:
        fail(f"{settings.config_path.name} is not valid:\n  " + "\n  ".join(error.problems))
    except DOWN as error:
        fail(f"a store cannot be used: {type(error).__name__}. `aap doctor` says more.")


def _welcome(settings: Settings, first_key: FirstKey | None, catalog_file: CatalogFile | None) -> None:
    if catalog_file is None:
        click.echo(f"\n  API key    {first_key.secret if first_key else ''}   (shown this once; the start failed)\n")
        return
    edge = settings.edge
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(edge.host, edge.host)  # noqa: S104 - shown, not listened on
    host = f"[{host}]" if ":" in host else host
    base_url = f"http://{host}:{edge.port}/v1"
    names = list(catalog_file.catalog.models)
    model = next((name for name in ("gpt-4.1-mini", "gpt-4o-mini") if name in names), names[0])
    key = first_key.secret if first_key else "$AAP_API_KEY"
    lines = ["", f"  base URL   {base_url}"]
    if first_key:
        lines.append(f"  API key    {first_key.secret}   (shown this once)")
    else:
        lines.append("  API key    yours; `aap keys create` makes another")
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    lines += [
        f"  models     {shown}",
        "",
        f"  curl {base_url}/chat/completions \\",
        f'    -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\',
        f"""    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'""",
        "",
        "  Ctrl-C stops the gateway.",
        "",
    ]
    click.echo("\n".join(lines))
    sys.stdout.flush()


@click.command()
def worker_command() -> None:
    """Run a worker process only, on the stores of DATABASE_URL and REDIS_URL."""
    settings = read_settings()
    if settings.database_url is None:
        fail("DATABASE_URL is not set: with embedded stores `aap serve` runs the worker")
    sys.exit(subprocess.run([sys.executable, "-m", "gateway.worker"], check=False).returncode)


@click.command()
@json_option
def migrate_command(as_json: bool) -> None:
    """Bring the database schema up to date. Safe to run twice, and from several machines at once."""
    from core.migrations import upgrade  # noqa: PLC0415 - not for `--help`

    async def act(url: str) -> str:
        database = Database(url, connections_max=1)
        try:
            return await upgrade(database)
        finally:
            await database.close()

    try:
        with embedded.stores(read_settings()) as stores:
            revision = asyncio.run(act(stores.database_url))
    except (EmbeddedUnavailable, *DOWN) as error:
        fail(f"the schema could not be brought up to date: {error}")
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
