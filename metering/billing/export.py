"""Telling Stripe of usage: every report once, whatever breaks on the way.

Whoever holds the lease on a cursor is the only one who plans and sends for that organization and meter, one report
after the other: Stripe takes one at a time of a customer and meter. A report is marked as sent before it is, and sent
again under the same identifier until Stripe has answered; that it knows it already is an answer. Stripe keeps
identifiers for a day, so that what is still open after 23 hours is never sent again: `reconcile` looks what became of
it. Stripe down: reports wait in the outbox. PostgreSQL down: nothing is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import structlog
from sqlalchemy.exc import DBAPIError

from core.clock import Clock
from core.database import Database
from core.ids import OrganizationId, new_id
from metering.billing import prepaid
from metering.billing.errors import StripeFailed, StripeOutcomeUnknown, StripeRefused, StripeThrottled
from metering.billing.meters import METERS
from metering.billing.outbox import Batch, Outcome, SendResult, claim, count_due, prepare, record
from metering.billing.stripe_api import STREAM_EVENTS_MAX, StripeApi
from metering.billing.stripe_objects import MeterEvent

_AT_ONCE: Final = 16
_CLAIMED: Final = 64
_log = structlog.get_logger(__name__)


class Exported(msgspec.Struct, kw_only=True):
    """How far a round has come."""

    turns: int = 0
    acked: int = 0
    open: int = 0
    refused: int = 0
    due: int = 0
    """How many organizations and meters waited when it began."""
    problem: str | None = None


Progress = Callable[[Exported], None]
_Addressed = tuple[int, str, MeterEvent]
"""Of which batch an event is, and of which report."""


class Exporter:
    """Sends what is due. Several may work at once, in one process or many: leases keep them apart."""

    def __init__(self, database: Database, api: StripeApi, clock: Clock, *, stream_above: int = 5_000) -> None:
        """From *stream_above* due cursors on, reports go by the meter event stream, many in a request."""
        self._database = database
        self._api = api
        self._clock = clock
        self._stream_above = stream_above
        self._worker = new_id("wrk")

    async def round(self, progress: Progress | None = None, *, only: OrganizationId | None = None) -> Exported:
        """Send until nothing is due (of one organization), or until Stripe has trouble.

        Errors: those of `core.database.DOWN`.
        """
        exported = Exported()
        async with self._database.transaction() as session:
            exported.due = await count_due(session, self._clock.now(), only=only)
        is_streamed = exported.due > self._stream_above
        while exported.problem is None:
            async with self._database.transaction() as session:
                claimed = await claim(session, self._worker, self._clock.now(), limit=_CLAIMED, only=only)
            if not claimed:
                break
            batches = await self._prepared(claimed)
            results = await (self._streamed(batches) if is_streamed else self._sent(batches))
            await self._recorded(batches, results, exported)
            if progress is not None:
                progress(exported)
        return exported

    async def _prepared(self, claimed: Sequence[tuple[OrganizationId, str]]) -> list[Batch]:
        batches: list[Batch] = []
        for organization_id, meter in claimed:
            async with self._database.transaction() as session:
                batch = await prepare(
                    session, self._worker, self._clock.now(), meter=meter, organization_id=organization_id
                )
            if batch is not None:
                batches.append(batch)
                if METERS[meter].bills:
                    await self._correct_gate(organization_id)
        return batches

    async def _correct_gate(self, organization_id: OrganizationId) -> None:
        """Keep the budget that credit comes to right; where settlements cannot be held up, the next turn does."""
        try:
            async with self._database.transaction() as session:
                await prepaid.correct_gate(session, self._clock.now(), organization_id=organization_id)
        except DBAPIError as error:
            _log.warning("credit_budget.not_set", organization_id=organization_id, error=type(error.orig).__name__)

    async def _sent(self, batches: Sequence[Batch]) -> list[SendResult]:
        """Send batches side by side, and the reports of each one after the other."""
        places = asyncio.Semaphore(_AT_ONCE)

        async def send(batch: Batch) -> SendResult:
            async with places:
                return await self._send(batch)

        return await asyncio.gather(*(send(batch) for batch in batches))

    async def _send(self, batch: Batch) -> SendResult:
        result = SendResult(outcomes={})
        for report_id, event in batch.reports:
            await self._tell_one(batch, report_id, event, result)
            if result.outcomes.get(report_id) != "acked":
                break
        return result

    async def _tell_one(self, batch: Batch, report_id: str, event: MeterEvent, result: SendResult) -> None:
        """Send one report, and note in *result* what came of it."""
        if self._clock.now() >= batch.send_before:
            result.failure = "the lease is about to end"
            return
        result.outcomes[report_id] = await self._tell(event, result)
        if result.outcomes[report_id] == "refused":
            result.refusal = (report_id, result.refusal_code or "refused")
            _log.error("meter_report.refused", organization_id=batch.organization_id, code=result.refusal_code)

    async def _tell(self, event: MeterEvent, result: SendResult) -> Outcome:
        """Send one event; return what came of it, and note in *result* why it was not taken."""
        try:
            await self._api.send_meter_event(event)
        except StripeRefused as error:
            if error.is_duplicate:
                return "acked"
            result.refusal_code = error.code
            return "refused"
        except StripeOutcomeUnknown as error:
            result.failure, result.is_stripes = str(error), True
            return "open"
        except StripeThrottled as error:
            result.failure, result.is_stripes = str(error), not error.is_lock
            return "not sent"
        except StripeFailed as error:
            result.failure, result.is_stripes = f"{type(error).__name__}: {error}", True
            return "not sent"
        return "acked"

    async def _streamed(self, batches: Sequence[Batch]) -> list[SendResult]:
        """Send the reports of all batches a hundred at a time: Stripe looks at each of them later."""
        results = [SendResult(outcomes={}) for _ in batches]
        events = [(index, *report) for index, batch in enumerate(batches) for report in batch.reports]
        for start in range(0, len(events), STREAM_EVENTS_MAX):
            chunk = events[start : start + STREAM_EVENTS_MAX]
            is_late = any(self._clock.now() >= batches[index].send_before for index, _, _ in chunk)
            failure = "the lease is about to end" if is_late else await self._stream(batches, results, chunk)
            if failure is not None:
                for index, _, _ in events[start:]:
                    results[index].failure = results[index].failure or failure
                    results[index].is_stripes = not is_late
                break
        return results

    async def _stream(
        self, batches: Sequence[Batch], results: Sequence[SendResult], chunk: Sequence[_Addressed]
    ) -> str | None:
        """Send a chunk in one request, and note in *results* what came of it; return why no other need be tried."""
        failure: str | None = None
        outcome: Outcome = "acked"
        try:
            await self._api.stream_meter_events([event for _, _, event in chunk])
        except StripeRefused:
            # One of them is wrong, and Stripe does not say which.
            return await self._tell_each(batches, results, chunk)
        except StripeOutcomeUnknown as error:
            failure, outcome = str(error), "open"
        except StripeFailed as error:
            failure, outcome = f"{type(error).__name__}: {error}", "not sent"
        for index, report_id, _ in chunk:
            results[index].outcomes[report_id] = outcome
        return failure

    async def _tell_each(
        self, batches: Sequence[Batch], results: Sequence[SendResult], chunk: Sequence[_Addressed]
    ) -> str | None:
        """Send the events of a chunk by themselves: after one that is not taken, no other of its batch."""
        for index, report_id, event in chunk:
            one = results[index]
            if one.failure is None and one.refusal is None:
                await self._tell_one(batches[index], report_id, event, one)
            if one.is_stripes:
                return one.failure
        return None

    async def _recorded(self, batches: Sequence[Batch], results: Sequence[SendResult], exported: Exported) -> None:
        for batch, one in zip(batches, results, strict=True):
            async with self._database.transaction() as session:
                await record(session, self._worker, batch, one, self._clock.now())
            exported.turns += 1
            for outcome in one.outcomes.values():
                exported.acked += outcome == "acked"
                exported.open += outcome == "open"
                exported.refused += outcome == "refused"
            if one.failure is not None:
                exported.problem = one.failure if one.is_stripes else exported.problem
                _log.warning("meter_reports.wait", organization_id=batch.organization_id, reason=one.failure)
