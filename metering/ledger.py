"""The ledger, as a gateway writes it: intents before the first byte, entries when calls end, checkpoints in between.

PostgreSQL down: what has ended waits here and is written when it is back; no new call is admitted once an intent has
waited for two seconds (LedgerUnavailable). A gateway that dies leaves its intents, from which a worker makes estimated
entries (`metering/sweeper.py`). Whatever is sent twice is entered once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Final

import asyncpg
import msgspec
import structlog

from core.clock import Clock
from core.database import DOWN
from core.ids import GatewayId
from core.writer import GroupCommit, Writer
from metering import partitions
from metering.corrections import correct
from metering.entries import INTEND, SETTLE, Entry, Intent, intend_arguments, settle_arguments
from metering.errors import LedgerUnavailable

# No byte reaches a caller before its intent is durable: for this long a call waits for that.
INTENT_SECONDS_MAX: Final = 2.0
# Measured: a batch of intents costs 50 µs of CPU here and 100 in PostgreSQL, a row 0.7 and 5; callers wait for it.
_INTENT_PAUSE_SECONDS: Final = 0.002
# A batch of a few is sent at once: no caller waits for company that does not come.
_FEW_INTENTS: Final = 4
# A batch of entries costs 80 and 250, a row 1.2 and 12. Nobody waits; a kill -9 makes estimates of what is not written.
_ENTRY_PAUSE_SECONDS: Final = 0.025
_ROWS_MAX: Final = 500
# A silent PostgreSQL is noticed before callers have waited in vain.
_STATEMENT_SECONDS_MAX: Final = 1.5
_ENTRY_STATEMENT_SECONDS_MAX: Final = 10.0
_CHECKPOINT_SECONDS: Final = 2.0
_WATCH_SECONDS: Final = 0.1
# What no further try can better: the row itself is refused.
_REFUSED: Final = (asyncpg.DataError, asyncpg.IntegrityConstraintViolationError)
_CHECKPOINT: Final = """
WITH lease AS (
  INSERT INTO gateway_leases (gateway_id, seen_at) VALUES ($1, now())
  ON CONFLICT (gateway_id) DO UPDATE SET seen_at = excluded.seen_at
)
UPDATE usage_intents i SET observed_output_tokens = o.tokens, checkpoint_at = now()
FROM unnest($2::text[], $3::int4[]) AS o (request_id, tokens) WHERE i.request_id = o.request_id
"""
# The same few statements for ever, each by keys: planned once, by their indexes, whatever the tables' statistics say
# while they are small. (Planning a settlement costs a millisecond, more than running it.)
_PLANNING: Final = {"plan_cache_mode": "force_generic_plan", "enable_seqscan": "off", "jit": "off"}
# A write, since a PostgreSQL that only reads is of no use here; one that says nothing: a lease is renewed together with
# the live calls, or its gateway would seem to have forgotten them.
_PROBE: Final = """
INSERT INTO gateway_leases (gateway_id, seen_at) VALUES ($1, now())
ON CONFLICT (gateway_id) DO UPDATE SET gateway_id = excluded.gateway_id
"""
_LEAVE: Final = "DELETE FROM gateway_leases WHERE gateway_id = $1"
_log = structlog.get_logger(__name__)


class _Waiting(msgspec.Struct, frozen=True):
    """An intent that is not durable yet, and who waits for it."""

    intent: Intent
    durable: asyncio.Future[None]
    added_at: float


class Ledger:
    """Writes what the calls of one gateway use. *observed* returns its live calls: request ids and output tokens."""

    def __init__(
        self, url: str, gateway_id: GatewayId, clock: Clock, *, observed: Callable[[], tuple[list[str], list[int]]]
    ) -> None:
        self._gateway_id = gateway_id
        self._clock = clock
        self._observed = observed
        self._loop = asyncio.get_running_loop()
        # Two connections: a large batch of entries must not hold up a first byte. Checkpoints go by the entries' one,
        # so that no two statements of a gateway wait for each other's intents.
        self._intent_writer = Writer(url, statement_seconds_max=_STATEMENT_SECONDS_MAX, planning=_PLANNING)
        self._entry_writer = Writer(url, statement_seconds_max=_ENTRY_STATEMENT_SECONDS_MAX, planning=_PLANNING)
        self._intents = GroupCommit(
            "intents",
            self._write_intents,
            pause_seconds=_INTENT_PAUSE_SECONDS,
            rows_max=_ROWS_MAX,
            few_rows=_FEW_INTENTS,
        )
        self._entries = GroupCommit(
            "entries", self._write_entries, pause_seconds=_ENTRY_PAUSE_SECONDS, rows_max=_ROWS_MAX
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._on_entered: dict[str, Callable[[], None]] = {}
        self._is_refusing = False
        self.refused_rows = 0
        """Rows that PostgreSQL would not take; their intents stay for the sweeper."""

    async def start(self) -> None:
        """Start writing. Returns also when PostgreSQL is down."""
        with contextlib.suppress(*DOWN):
            await partitions.make_ahead(self._entry_writer.fetch, self._clock.now())
            await self._checkpoint()
        self._intents.start()
        self._entries.start()
        self._tasks = [
            self._loop.create_task(self._checkpoint_forever()),
            self._loop.create_task(self._watch()),
        ]

    async def close(self, timeout_seconds: float = 5.0) -> None:
        """Write what is left. What cannot be written in time is logged; its intents stay for the sweeper."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        lost = await self._intents.close(timeout_seconds) + await self._entries.close(timeout_seconds)
        if lost:
            _log.error("ledger.closed_with_rows_left", rows=lost)
        else:
            with contextlib.suppress(*DOWN):
                await self._entry_writer.fetch(_LEAVE, self._gateway_id)
        await self._intent_writer.close()
        await self._entry_writer.close()

    @property
    def undurable_seconds(self) -> float:
        """For how long the oldest intent has not been durable; 0 when all are."""
        oldest = self._intents.oldest
        return 0.0 if oldest is None else self._loop.time() - oldest.added_at

    @property
    def intents_waiting(self) -> int:
        """How many intents are not durable yet."""
        return len(self._intents)

    @property
    def entries_waiting(self) -> int:
        """How many entries are not written yet."""
        return len(self._entries)

    @property
    def failures(self) -> int:
        """How many times a batch could not be written."""
        return self._intents.failures + self._entries.failures

    def intend(self, intent: Intent) -> asyncio.Future[None]:
        """Write down that a call is about to reach a provider; the future is done when that is durable.

        Again for the same call: the later intent replaces the earlier one. Errors: LedgerUnavailable, at once when
        PostgreSQL has been down for two seconds, and from the future for who had to wait that long.
        """
        if self._is_refusing:
            raise LedgerUnavailable
        durable: asyncio.Future[None] = self._loop.create_future()
        self._intents.add(_Waiting(intent, durable, self._loop.time()))
        return durable

    def settle(
        self, entry: Entry, intent: asyncio.Future[None] | None, on_entered: Callable[[], None] | None = None
    ) -> None:
        """Enter *entry*; its intent leaves in the same transaction. Never waits, never fails.

        *on_entered* is called once that is durable.
        """
        if on_entered is not None:
            self._on_entered[entry.request_id] = on_entered
        if intent is None or intent.done():
            self._entries.add(entry)
        else:
            # Behind its intent: one that came later than the entry would be taken for a lost call.
            intent.add_done_callback(lambda _: self._entries.add(entry))

    async def _write_intents(self, waiting: list[_Waiting]) -> None:
        # Those whose callers were told that it took too long are left out: their entries may be there already.
        wanted = {one.intent.request_id: one.intent for one in waiting if not one.durable.done()}
        if not wanted:
            # Stays here, and new calls are refused, until PostgreSQL writes.
            await self._intent_writer.fetch(_PROBE, self._gateway_id)
            self._is_refusing = False
            return
        try:
            await self._intent_writer.fetch(INTEND, *intend_arguments(self._gateway_id, list(wanted.values())))
        except _REFUSED as error:
            self.refused_rows += len(wanted)
            _log.error("ledger.intents_refused", error=str(error), request_ids=list(wanted)[:10])
            _fail(waiting)
            return
        self._is_refusing = False
        for one in waiting:
            if not one.durable.done():
                one.durable.set_result(None)

    async def _write_entries(self, entries: Sequence[Entry], *, may_lack_partition: bool = True) -> None:
        try:
            rows = await self._entry_writer.fetch(SETTLE, *settle_arguments(entries))
        except asyncpg.CheckViolationError:
            made = await partitions.make_for(self._entry_writer.fetch, [entry.request_id for entry in entries])
            if not made or not may_lack_partition:
                raise
            await self._write_entries(entries, may_lack_partition=False)
        except asyncpg.ForeignKeyViolationError:
            # A budget of theirs was deleted meanwhile: the next try, which `GroupCommit` makes, does not see it.
            raise
        except _REFUSED as error:
            await self._write_apart(entries, error)
        else:
            if rows[0][0] < len(entries):
                await correct(self._entry_writer.fetch, entries)
            if self._on_entered:
                self._tell(entries)

    def _tell(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            on_entered = self._on_entered.pop(entry.request_id, None)
            if on_entered is not None:
                on_entered()

    async def _write_apart(self, entries: Sequence[Entry], error: Exception) -> None:
        """Find the row that PostgreSQL refuses, and write the others."""
        if len(entries) == 1:
            self.refused_rows += 1
            self._on_entered.pop(entries[0].request_id, None)
            _log.error("ledger.entry_refused", request_id=entries[0].request_id, error=str(error))
            return
        half = len(entries) // 2
        await self._write_entries(entries[:half])
        await self._write_entries(entries[half:])

    async def _checkpoint_forever(self) -> None:
        while True:
            await asyncio.sleep(_CHECKPOINT_SECONDS)
            try:
                await self._checkpoint()
            except DOWN as error:
                _log.warning("ledger.checkpoint_failed", error=type(error).__name__)

    async def _checkpoint(self) -> None:
        """Renew this gateway's lease, and write down what its live calls have brought so far: one statement."""
        await self._entry_writer.fetch(_CHECKPOINT, self._gateway_id, *self._observed())

    async def _watch(self) -> None:
        """Tell callers that their intents take too long, whatever PostgreSQL does meanwhile."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            self._is_refusing = self.undurable_seconds > INTENT_SECONDS_MAX
            too_old = self._loop.time() - INTENT_SECONDS_MAX
            _fail([one for one in self._intents.items() if one.added_at < too_old])


def _fail(waiting: Sequence[_Waiting]) -> None:
    for one in waiting:
        if not one.durable.done():
            one.durable.set_exception(LedgerUnavailable())
            # Read here once: a caller who is gone by now must not leave an error that nobody has looked at.
            one.durable.exception()
