"""Webhooks on their way: queued, late, twice, out of order, lost, retried; the server's shell carries them."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import msgspec

from metering.billing.twin.options import Mischief, TwinOptions


class Delivery(msgspec.Struct, kw_only=True):
    """One event on its way to one URL. *due_at* is on the twin's own clock, in Unix seconds."""

    event_id: str
    type: str
    url: str
    secret: str
    body: bytes
    due_at: int
    attempts: int = 0
    # The statuses that were answered; None is no answer.
    outcomes: list[int | None] = msgspec.field(default_factory=list[int | None])


class Outbox:
    """Deliveries in the order in which they will go. Draws its mischief from the twin's seed."""

    def __init__(self, options: TwinOptions) -> None:
        self.mischief = options.mischief
        self.is_paused = False
        self.waiting: list[Delivery] = []
        self.done: deque[Delivery] = deque(maxlen=options.journal_max)
        self.dropped: deque[Delivery] = deque(maxlen=options.journal_max)
        self._retry_seconds = options.webhook_retry_seconds
        self._chance = random.Random(options.seed)  # noqa: S311 - mischief has to be repeatable

    def set_mischief(self, mischief: Mischief) -> None:
        """Have webhooks travel by *mischief* from now on."""
        self.mischief = mischief

    def send(self, event: dict[str, Any], url: str, secret: str, now: int) -> None:
        """Queue *event*, or lose it, or queue it twice, or before others: as the mischief says."""
        mischief, draw = self.mischief, self._chance.random
        for _ in range(2 if draw() < mischief.duplicate_share else 1):
            delivery = Delivery(
                event_id=event["id"],
                type=event["type"],
                url=url,
                secret=secret,
                body=msgspec.json.encode(event),
                due_at=now + self._chance.randint(0, mischief.delay_seconds_max),
            )
            if draw() < mischief.drop_share:
                self.dropped.append(delivery)
            elif draw() < mischief.reorder_share:
                self.waiting.insert(self._chance.randint(0, len(self.waiting)), delivery)
            else:
                self.waiting.append(delivery)

    def take_due(self, now: int) -> Delivery | None:
        """Take the first delivery that is due, unless deliveries are paused."""
        if self.is_paused:
            return None
        for index, delivery in enumerate(self.waiting):
            if delivery.due_at <= now:
                return self.waiting.pop(index)
        return None

    def record(self, delivery: Delivery, status: int | None, now: int) -> None:
        """Note the answer; anything but a 2xx is tried again later, by the schedule, and in the end given up."""
        delivery.outcomes.append(status)
        delivery.attempts += 1
        if (status is not None and 200 <= status < 300) or delivery.attempts > len(self._retry_seconds):
            self.done.append(delivery)
            return
        delivery.due_at = now + self._retry_seconds[delivery.attempts - 1]
        self.waiting.append(delivery)
