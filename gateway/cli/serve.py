"""What `aap serve` and `aap worker` do."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import click
import msgspec

from core.configuration import ConfigurationInvalid
from core.database import DOWN
from core.embedded import EmbeddedUnavailable
from core.http1.proxies import ProxyInvalid
from core.settings import EdgeSettings
from core.telemetry import configure_logs
from gateway import supervisor
from gateway.catalog_file import CatalogFile
from gateway.cli.common import fail, print_json_line
from gateway.cli.stores import read_settings
from gateway.first_run import FirstKey
from gateway.supervisor import PortTaken, ProcessFailed
from keys.secrets import redact


class _Welcome(msgspec.Struct, frozen=True):
    """What somebody needs for a first call. *base_url* is None when a first key was made and the start then failed."""

    base_url: str | None
    api_key: str | None
    models: list[str]


def serve(given: Mapping[str, str | int | None], *, with_worker: bool, as_json: bool) -> None:
    """Run the gateway until it is told to stop. *given* are variables, also for the processes that are started."""
    # All at once, so that what is wrong in the environment and overridden here is not complained of.
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    settings = read_settings()
    configure_logs(settings.log, redact)

    def welcome(first_key: FirstKey | None, catalog_file: CatalogFile | None) -> None:
        shown = _welcome(settings.edge, first_key, catalog_file)
        if as_json:
            print_json_line(shown)
        else:
            _print_welcome(shown)

    def draining() -> None:
        seconds = settings.edge.drain_notice_seconds + settings.edge.drain_seconds
        if not as_json:
            click.echo(f"Draining: open calls have {seconds:g} s at most. Ctrl-C again stops at once.", err=True)

    try:
        supervisor.serve(settings, with_worker=with_worker, welcome=welcome, draining=draining)
    except PortTaken as error:
        fail(f"{error}. Choose another with --port.")
    except (EmbeddedUnavailable, ProcessFailed, ProxyInvalid) as error:
        fail(str(error))
    except ConfigurationInvalid as error:
        fail(f"{settings.config_path.name} is not valid:\n  " + "\n  ".join(error.problems))
    except DOWN as error:
        fail(f"a store cannot be used: {type(error).__name__}. `aap doctor` says more.")


def work() -> None:
    """Run the worker processes until they are told to stop."""
    settings = read_settings()
    configure_logs(settings.log, redact)
    if settings.database_url is None:
        fail("DATABASE_URL is not set: with embedded stores `aap serve` runs the workers")
    supervisor.work(settings)


def _welcome(edge: EdgeSettings, first_key: FirstKey | None, catalog_file: CatalogFile | None) -> _Welcome:
    api_key = first_key.secret if first_key else None
    if catalog_file is None:
        return _Welcome(None, api_key, [])
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(edge.host, edge.host)  # noqa: S104 - shown, not listened on
    host = f"[{host}]" if ":" in host else host
    return _Welcome(f"http://{host}:{edge.port}/v1", api_key, list(catalog_file.catalog.models))


def _print_welcome(welcome: _Welcome) -> None:
    if welcome.base_url is None:
        click.echo(f"\n  API key    {welcome.api_key or ''}   (shown this once; the start failed)\n")
        return
    names = welcome.models
    model = next((name for name in ("gpt-4.1-mini", "gpt-4o-mini") if name in names), names[0])
    key = welcome.api_key or "$AAP_API_KEY"
    lines = ["", f"  base URL   {welcome.base_url}"]
    if welcome.api_key:
        lines.append(f"  API key    {welcome.api_key}   (shown this once)")
    else:
        lines.append("  API key    yours; `aap keys create` makes another")
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    lines += [
        f"  models     {shown}",
        "",
        f"  curl {welcome.base_url}/chat/completions \\",
        f'    -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\',
        f"""    -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'""",
        "",
        "  Ctrl-C stops the gateway.",
        "",
    ]
    click.echo("\n".join(lines))
    sys.stdout.flush()
