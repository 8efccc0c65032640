"""`aap metrics`."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import click

from gateway.cli.common import json_option, show
from gateway.cli.usage import range_options

_DAYS_DEFAULT = 30
_COLUMNS = (
    *("day", "mrr_usd", "new_usd", "reactivation_usd", "expansion_usd", "contraction_usd", "churn_usd"),
    *("paying", "trialing", "customer_churn", "revenue_churn", "arpu_usd", "clv_usd"),
    *("active_day", "active_week", "active_month", "usage_usd", "cost_usd", "margin"),
)


@click.command()
@range_options
@click.option("--recompute", is_flag=True, help="Compute the days anew first, and all later ones that are stored.")
@json_option
def metrics_command(since: datetime | None, to: datetime | None, recompute: bool, as_json: bool) -> None:
    """Show the business by day: revenue that recurs and how it moved, churn, who is active, usage and its cost.

    Days are those of UTC, and are shown once they are over. A worker computes each of them once, and mends the last 35
    when an event of then is booked later. What the numbers mean: docs/business-metrics.md. Default: the last 30 days.
    """
    from gateway.cli import metric_acts

    first, last = _range(since, to)
    found = metric_acts.days(first, last, recompute=recompute)
    show(
        found if as_json else [metric_acts.metrics_row(day) for day in found],
        _COLUMNS,
        as_json=as_json,
        empty="No day of that time is computed yet. A worker does it once a day; --recompute does it now.",
    )


def _range(since: datetime | None, to: datetime | None) -> tuple[date, date]:
    """Return the first day and the last one. Errors: UsageError."""
    yesterday = datetime.now(UTC).date() - timedelta(days=1)
    if to is not None and since is None:
        raise click.UsageError("--to needs --from")
    last = to.date() - timedelta(days=1) if to else yesterday
    first = since.date() if since else last - timedelta(days=_DAYS_DEFAULT - 1)
    if first > last:
        raise click.UsageError("--from must be earlier than --to, and than today")
    if last > yesterday:
        raise click.UsageError("--to: a day is shown once it is over, in UTC")
    return first, last
