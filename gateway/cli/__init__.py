"""`aap`: the command line.

The modules named after commands only declare them: options, help, how results are shown. What a command does, and all
that it takes, is imported when it is run, so that every `--help` is quick.

Exit codes: 0 done, 1 the command could not do it, 2 it was called wrongly. With --json, what went wrong is one JSON
object on standard error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

import rich_click as click

from gateway.cli.common import print_error

# Command → (module, its first line of help). The help stands here so that listing commands imports none of them.
_COMMANDS: Final = {
    "serve": ("serving", "Run the gateway: stores, schema, API processes, worker."),
    "worker": ("serving", "Run a worker process only."),
    "migrate": ("serving", "Bring the database schema up to date."),
    "doctor": ("doctor", "Check this installation and say what is wrong."),
    "keys": ("keys", "Create, list, find, rotate and revoke API keys."),
    "orgs": ("tenants", "Create and list organizations, give them plans, suspend them."),
    "plans": ("plans", "List the plans of aap.toml, and what was used of them."),
    "projects": ("tenants", "Create and list projects."),
    "budgets": ("budgets", "Show and set budgets: how much may be charged."),
    "limits": ("limits", "Show and set rate limits."),
    "usage": ("usage", "Show what was used and what it is charged."),
    "ledger": ("ledger", "Export, check and correct the ledger."),
    "prices": ("prices", "Show, set and import prices."),
    "stripe": ("stripe", "Put plans up for sale, report usage, and compare with Stripe."),
    "wallet": ("wallet", "Show and add prepaid credit."),
    "webhooks": ("webhooks", "Manage webhook endpoints, look at deliveries, send again."),
    "metrics": ("metrics", "Show revenue, churn and activity by day."),
    "models": ("models", "List the models of the catalog and their deployments."),
    "import": ("models", "Convert another gateway's configuration."),
    "version": ("serving", "Print the version."),
}


class LazyCommands(click.RichGroup):
    """Knows the commands by name, and imports one when it is run."""

    _is_listing = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the table."""
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command; while they are listed, a stand-in with its line of help."""
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module, summary = _COMMANDS[cmd_name]
        if self._is_listing:
            return click.Command(cmd_name, help=summary)
        return getattr(import_module(f"gateway.cli.{module}"), f"{cmd_name}_command")

    def format_help(self, ctx: click.RichContext, formatter: click.RichHelpFormatter) -> None:
        """Write the help, importing no command for it."""
        self._is_listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._is_listing = False


@click.group(cls=LazyCommands, context_settings={"help_option_names": ["-h", "--help"]})
def aap() -> None:
    """Operate the AI Agent Platform gateway."""


def main() -> None:
    """Run the command line."""
    if not _asks_for_json(sys.argv[1:]):
        aap.main(prog_name="aap")
    try:
        code = aap.main(prog_name="aap", standalone_mode=False)
    except click.ClickException as error:
        print_error(error.format_message(), as_json=True)
        sys.exit(error.exit_code)
    except click.Abort:
        print_error("interrupted", as_json=True)
        sys.exit(1)
    sys.exit(code)


def _asks_for_json(arguments: Sequence[str]) -> bool:
    """Tell whether --json is among the options: click refuses a wrong call before it has read them all."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in options
