"""Business metrics for the operator: ours, in the style of the routes beside it."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Final, Literal

from litestar import Request, get
from msgspec import Meta, Struct

from core.errors import Invalid
from gateway.routes.query_string import described_by, read_query
from gateway.runtime import Runtime
from keys.principal import Principal
from metering.billing.metrics import DailyMetrics, list_metrics

_DAYS_DEFAULT: Final = 30
_DAYS_MAX: Final = 366


class MetricsQuery(Struct, frozen=True, kw_only=True):
    """Which days."""

    start_date: Annotated[date, Meta(description="The first day, in UTC. Default: 29 days before end_date.")] | None = (
        None
    )
    end_date: Annotated[date, Meta(description="The last day, which is included. Default: yesterday.")] | None = None


class MetricsList(Struct, frozen=True):
    """Days in order. One that was not computed is not among them."""

    data: list[DailyMetrics]
    object: Literal["list"] = "list"


@get(
    "/v1/billing/metrics",
    summary="List business metrics",
    operation_id="list_billing_metrics",
    operation_class=described_by(MetricsQuery),
)
async def list_billing_metrics(request: Request[Any, Any, Any], principal: Principal, runtime: Runtime) -> MetricsList:
    """Return revenue, churn and activity by day, of all organizations: for the operator."""
    principal.require_scope("operator:read")
    first, last = _range(read_query(request, MetricsQuery))
    async with runtime.reading.page(principal.organization_id) as session:
        return MetricsList(await list_metrics(session, first, last))


def _range(asked: MetricsQuery) -> tuple[date, date]:
    last = asked.end_date or datetime.now(UTC).date() - timedelta(days=1)
    if last < date.min + timedelta(days=_DAYS_DEFAULT):
        raise Invalid("Invalid 'end_date': nothing was sold then.", param="end_date")
    first = asked.start_date or last - timedelta(days=_DAYS_DEFAULT - 1)
    if last < first:
        raise Invalid("Invalid 'end_date': it must not be earlier than 'start_date'.", param="end_date")
    if (last - first).days >= _DAYS_MAX:
        raise Invalid(f"Invalid 'start_date': at most {_DAYS_MAX} days at once.", param="start_date")
    return first, last


ROUTES = (list_billing_metrics,)
