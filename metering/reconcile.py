"""What Redis holds of budgets and allowances is put right here by what PostgreSQL knows: a worker's doing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timedelta
from importlib.resources import files
from typing import Any, Final, NamedTuple

from redis.asyncio import Redis
from sqlalchemy import ARRAY, Text, any_, func, select, text
from sqlalchemy import cast as cast_to

from core.clock import Clock
from core.database import Database
from core.ids import moment_of
from keys.allowances import NOTHING_COUNTED, Counted
from keys.caps import Cap
from metering import allowances, caps
from metering.caps import CapPeriod, Pages
from metering.tables import LedgerEntryRow, UsageIntentRow

_RECONCILE: Final = files("metering").joinpath("budget_reconcile.lua").read_text()
# Within 2.6 s of its reservation a call's intent is durable, or the call refused: half a second for Redis's answer
# (`core.resp`), two and a look every 0.1 s for the intent (`metering.ledger`). The rest is for an event loop and a
# PostgreSQL that are held up. A worker's rounds are 5 s apart: the second of two is enough.
ROUNDS_APART_SECONDS: Final = 4.0
# What PostgreSQL knows nothing of has mostly just come, and is not worth a mark. And where a gateway stands still
# before it writes an intent (a paused machine), calls that had just come are safe for so long, not only for the above.
_ABANDONED_AFTER: Final = timedelta(seconds=60)
# What marks are made of: to Python and Lua, "60 \t \n" is the same number as "60".
_MARK_BYTES: Final = b" \t\n\r"


class _Sighting(NamedTuple):
    """What Redis held for a call, to the byte, by the end of some round."""

    value: bytes
    at_seconds: float


class Rounds:
    """What the rounds of one worker have seen held in Redis for calls that do not run.

    A call reserves in Redis first, and PostgreSQL hears of it a little later; under an Idempotency-Key it may reserve
    anew under the id of a lost call, however old that is, and be it in the ledger. So a reservation is settled for
    others only when two rounds, *apart_seconds* or more from each other, have seen the very same.

    The amount cannot say that it is the same. The first round to see it therefore puts a mark behind the amount: white
    space that no other round has made. Whoever reads the number reads the same one; a new reservation under the same id
    writes the number alone (`keys/quota.lua`), and is seen for the first time again.

    All is kept in memory, and by one clock: a restarted worker begins anew, and of several each judges for itself. A
    mark that it has not seen before is one more first sight.
    """

    def __init__(self, clock: Clock, apart_seconds: float = ROUNDS_APART_SECONDS) -> None:
        self._clock = clock
        self._apart_seconds = apart_seconds
        self._began_seconds = 0.0
        self._before: dict[tuple[bytes, bytes], _Sighting] = {}
        self._now: dict[tuple[bytes, bytes], bytes] = {}
        self.mark = b""

    def begin(self) -> None:
        """Begin a round. What one that failed has seen is forgotten; its marks are found by this one."""
        self._began_seconds = self._clock.monotonic_seconds()
        self._now = {}
        self.mark = bytes(_MARK_BYTES[byte & 3] for byte in os.urandom(16))

    def have_seen(self, place: tuple[bytes, bytes], value: bytes) -> bool:
        """Tell whether this very reservation was seen long enough before this round began."""
        seen = self._before.get(place)
        return seen is not None and seen.value == value and self._began_seconds - seen.at_seconds >= self._apart_seconds

    def see(self, place: tuple[bytes, bytes], value: bytes) -> None:
        """Note what Redis holds, as it is marked by the end of this round."""
        self._now[place] = value

    def end(self) -> None:
        """Remember what this round has seen, and nothing else. It counts from now: every mark was made by now."""
        now_seconds, before = self._clock.monotonic_seconds(), self._before
        self._before = {
            place: seen if (seen := before.get(place)) and seen.value == value else _Sighting(value, now_seconds)
            for place, value in self._now.items()
        }


class _Known(NamedTuple):
    """What PostgreSQL knows of calls that Redis holds, and of the caps that hold them, in one snapshot."""

    charged: dict[str, int]
    """What those that have ended were charged, in nano-USD."""
    counted: dict[str, Counted]
    """What they count for."""
    running: set[str]
    spent: dict[bytes, int]

    def amount(self, cap: Cap, request_id: str) -> int | None:
        """Return what a call that has ended took of *cap*; None if it has not."""
        charge = self.charged.get(request_id)
        return None if charge is None else caps.amount(cap, charge, self.counted.get(request_id, NOTHING_COUNTED))


async def reconcile(
    database: Database, redis: Redis, clock: Clock, rounds: Rounds, pages: Pages = caps.budget_pages
) -> int:
    """Put right what Redis holds of caps; return how many reservations were settled for others.

    Of soft budgets and unlimited units too, if Redis knows them: it has not counted since they held, and they may
    again.

    What two of the *rounds* have seen held for a call that does not run is charged what the ledger says, or given back
    if the ledger says nothing and the id is a minute old; and Redis knows as much as PostgreSQL then.

    Errors: what either store raises. The pages of caps before that are done; the next round does the rest.
    """
    rounds.begin()
    count = 0
    async for page in pages(database):
        count += await _reconcile_page(database, redis, clock, rounds, page)
    rounds.end()
    return count


async def _reconcile_page(database: Database, redis: Redis, clock: Clock, rounds: Rounds, page: list[Cap]) -> int:
    now = clock.now()
    periods = await _known_to(redis, [CapPeriod.around(cap, now) for cap in page])
    if not periods:
        return 0
    # In this order. What was spent before the reservations are read is settled in Redis, or still reserved and found
    # among them; and what Redis has counted by then is all in PostgreSQL afterwards.
    async with database.transaction() as session:
        spent_before = await caps.spent_in(session, periods)
    read = await _read_states(redis, periods)
    states = [(one, state) for one, state in zip(periods, read, strict=True) if b"s" in state]
    held = {name.decode() for _, state in states for name in state if len(name) > 1}
    known = await _read_known(database, list(held), [one for one, _ in states])
    # Not as transactions: in a cluster, each organization's caps may live on another node.
    writing: Any = redis.pipeline(transaction=False)
    for one, state in states:
        settled, spent_later = _judge(one, state, known, rounds, now - _ABANDONED_AFTER)
        spent = int(state[b"s"])
        least = spent_before.get(one.key, 0) - spent_later
        excess = max(0, spent - known.spent.get(one.key, 0))
        if settled or excess or spent < least:
            writing.eval(_RECONCILE, 1, one.key, least, excess, rounds.mark, *settled)
    return sum(map(int, await writing.execute()))


async def _known_to(redis: Redis, periods: list[CapPeriod]) -> list[CapPeriod]:
    """Return those of which Redis knows anything: of most organizations' plans that is nothing."""
    asking: Any = redis.pipeline(transaction=False)
    for one in periods:
        asking.exists(one.key)
    return [one for one, is_known in zip(periods, await asking.execute(), strict=True) if is_known]


async def _read_states(redis: Redis, periods: list[CapPeriod]) -> list[dict[bytes, bytes]]:
    reading: Any = redis.pipeline(transaction=False)
    for one in periods:
        reading.hgetall(one.key)
    return await reading.execute()


def _judge(
    period: CapPeriod, state: Mapping[bytes, bytes], known: _Known, rounds: Rounds, oldest: datetime
) -> tuple[list[bytes | int], int]:
    """Return the script's arguments for what is held and does not run, and what was spent of that which stays held.

    The latter counts as spent when it is taken out, not before.
    """
    arguments: list[bytes | int] = []
    spent_later = 0
    for name, value in state.items():
        request_id = name.decode()
        if len(name) == 1 or request_id in known.running:
            continue
        spent = known.amount(period.cap, request_id)
        if spent is None and moment_of(request_id) >= oldest:
            continue
        place = (period.key, name)
        if rounds.have_seen(place, value):
            arguments += (name, value, spent or 0)
            continue
        spent_later += spent or 0
        is_marked = not value.isdigit()
        if not is_marked:
            arguments += (name, value, b"")
        rounds.see(place, value if is_marked else value + rounds.mark)
    return arguments, spent_later


async def _read_known(database: Database, held: list[str], periods: list[CapPeriod]) -> _Known:
    """Return what is known of the calls *held*, and of the caps in these periods."""
    ids = any_(cast_to(held, ARRAY(Text)))
    charged = (
        select(LedgerEntryRow.request_id, func.sum(LedgerEntryRow.charge_nano_usd))
        .where(LedgerEntryRow.request_id == ids)
        .group_by(LedgerEntryRow.request_id)
    )
    running = select(UsageIntentRow.request_id).where(UsageIntentRow.request_id == ids)
    async with database.transaction() as session:
        # One snapshot for all: a call that ends meanwhile is still running in it.
        await session.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
        return _Known(
            {row[0]: int(row[1]) for row in await session.execute(charged)},
            await allowances.ended(session, ids),
            set(await session.scalars(running)),
            await caps.spent_in(session, periods),
        )
