"""Claims and answers of requests with an Idempotency-Key, in PostgreSQL: they outlive the process that made them.

A claim has a lease of its own, which its gateway renews while it works: one that nobody works on any more (its gateway
died, or could not give it up) is free again when the lease has run out. Gateway and request id together tell a claim
from every other one of the same key, so that what comes too late changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, Literal

import msgspec
from sqlalchemy import text

from core.database import Database
from core.ids import GatewayId, KeyId
from metering.entries import LOST

# Whoever inserts the row works on the request. A row that has expired is as good as none. The retention begins with the
# answer: a claim must not expire while it is worked on.
_CLAIM: Final = text("""
INSERT INTO idempotent_answers AS a
  (key_id, idempotency_key, organization_id, request_digest, request_id, gateway_id, state, expires_at)
VALUES (:key_id, :idempotency_key, :organization_id, :digest, :request_id, :gateway_id, 'running',
  now() + CAST(:kept AS interval) + interval '1 day')
ON CONFLICT (key_id, idempotency_key) DO UPDATE SET
  request_digest = excluded.request_digest, request_id = excluded.request_id, gateway_id = excluded.gateway_id,
  state = 'running', status = NULL, content_type = NULL, body = NULL, claimed_at = now(),
  expires_at = excluded.expires_at
WHERE a.expires_at < now()
RETURNING request_id
""")
# A PostgreSQL that has just come up has not heard of anybody for a while: it gives them the time of a lease.
_FIND: Final = text("""
SELECT request_digest, request_id, gateway_id, state, status, content_type, body,
  greatest(claimed_at, pg_postmaster_start_time()) < now() - CAST(:lease AS interval) AS is_abandoned
FROM idempotent_answers
WHERE key_id = :key_id AND idempotency_key = :idempotency_key AND expires_at >= now()
""")
# The ledger knows a lost call, or soon will, by its request id: under the same one both are billed once. What was
# entered as it was, or given up by this very gateway, is a call of its own: the next one needs another id.
_TAKE_OVER: Final = text("""
UPDATE idempotent_answers AS a SET gateway_id = CAST(:gateway_id AS text), claimed_at = now(), request_id = CASE
  WHEN gateway_id = CAST(:gateway_id AS text) OR EXISTS (
    SELECT 1 FROM ledger_entries e WHERE e.request_id = a.request_id AND e.outcome <> :lost
  ) THEN :request_id ELSE a.request_id END
WHERE key_id = :key_id AND idempotency_key = :idempotency_key AND state = 'running'
  AND gateway_id = :other_gateway_id AND request_id = :other_request_id
  AND (gateway_id = CAST(:gateway_id AS text)
    OR greatest(claimed_at, pg_postmaster_start_time()) < now() - CAST(:lease AS interval))
RETURNING request_id
""")
_RENEW: Final = text("""
UPDATE idempotent_answers AS a SET claimed_at = now()
FROM unnest(CAST(:key_ids AS text[]), CAST(:idempotency_keys AS text[]), CAST(:request_ids AS text[]))
  AS h (key_id, idempotency_key, request_id)
WHERE a.key_id = h.key_id AND a.idempotency_key = h.idempotency_key AND a.request_id = h.request_id
  AND a.gateway_id = :gateway_id AND a.state = 'running'
""")
_COMPLETE: Final = text("""
UPDATE idempotent_answers
SET state = :state, status = :status, content_type = :content_type, body = :body,
  expires_at = now() + CAST(:kept AS interval)
WHERE key_id = :key_id AND idempotency_key = :idempotency_key AND state = 'running'
  AND gateway_id = :gateway_id AND request_id = :request_id
""")
_RELEASE: Final = text("""
DELETE FROM idempotent_answers
WHERE key_id = :key_id AND idempotency_key = :idempotency_key AND state = 'running'
  AND gateway_id = :gateway_id AND request_id = ANY(CAST(:request_ids AS text[]))
""")
# Nobody's, and to be taken over at once, under the same id: that of a lost call, which is or will be in the ledger.
_HAND_BACK: Final = text("""
UPDATE idempotent_answers SET gateway_id = '', claimed_at = 'epoch'
WHERE key_id = :key_id AND idempotency_key = :idempotency_key AND state = 'running'
  AND gateway_id = :gateway_id AND request_id = :request_id
""")
_PRUNE: Final = text("""
DELETE FROM idempotent_answers WHERE (key_id, idempotency_key) IN (
  SELECT key_id, idempotency_key FROM idempotent_answers WHERE expires_at < now() LIMIT 1000)
  AND expires_at < now()
RETURNING 1
""")

State = Literal["running", "done", "too_large"]


class ClaimKey(msgspec.Struct, frozen=True):
    """Whose claim it is, and which: two API keys may use the same Idempotency-Key for different things."""

    key_id: KeyId
    idempotency_key: str

    def named(self, **more: Any) -> dict[str, Any]:
        """Return the parameters of a statement."""
        return {"key_id": self.key_id, "idempotency_key": self.kept_as, **more}

    @property
    def kept_as(self) -> str:
        """How the key stands in the database: as a digest, since some callers send a secret for a key."""
        return hashlib.sha256(self.idempotency_key.encode()).hexdigest()


class Hold(msgspec.Struct, frozen=True):
    """A claim that this gateway has. The call that answers it goes by *request_id*.

    It *is_inherited* where that is the id of a call that was lost.
    """

    key: ClaimKey
    request_id: str
    is_inherited: bool = False


class KeptAnswer(msgspec.Struct, frozen=True):
    """An answer that was given before. *head* is its content type, and the provider's headers behind it, as lines."""

    request_id: str
    status: int
    head: bytes
    body: bytes


class FoundClaim(msgspec.Struct, frozen=True):
    """What is known of an Idempotency-Key that was used before."""

    digest: bytes
    gateway_id: str
    state: State
    is_abandoned: bool
    answer: KeptAnswer
    """Of a claim that is `done`; of others only the request id is known."""


class Claims:
    """The claims of one gateway. Every method's errors are those of `core.database.DOWN`."""

    def __init__(self, database: Database, gateway_id: GatewayId, *, kept_seconds: float, lease_seconds: float) -> None:
        self._database = database
        self.gateway_id = gateway_id
        self.lease_seconds = lease_seconds
        self._kept = timedelta(seconds=kept_seconds)
        self._lease = timedelta(seconds=lease_seconds)

    async def claim(self, key: ClaimKey, digest: bytes, request_id: str, organization_id: str) -> Hold | None:
        """Claim an Idempotency-Key that nobody has used; None if somebody has."""
        values = {"organization_id": organization_id, "digest": digest, "request_id": request_id, "kept": self._kept}
        return await self._take(_CLAIM, key, values)

    async def find(self, key: ClaimKey) -> FoundClaim | None:
        """Return what is known of a key."""
        async with self._database.transaction() as session:
            row = (await session.execute(_FIND, key.named(lease=self._lease))).one_or_none()
        if row is None:
            return None
        return FoundClaim(
            digest=row.request_digest,
            gateway_id=row.gateway_id,
            state=row.state,
            is_abandoned=row.is_abandoned,
            answer=KeptAnswer(
                row.request_id, row.status or 0, (row.content_type or "").encode("latin-1"), row.body or b""
            ),
        )

    async def take_over(self, key: ClaimKey, found: FoundClaim, request_id: str) -> Hold | None:
        """Take a claim that nobody works on any more; None if somebody was faster.

        The call goes by the id of the one that was lost, or by *request_id* if there was none to be billed with it.
        """
        other = {"other_gateway_id": found.gateway_id, "other_request_id": found.answer.request_id}
        values = {**other, "request_id": request_id, "lost": LOST, "lease": self._lease}
        hold = await self._take(_TAKE_OVER, key, values)
        if hold is None or hold.request_id != found.answer.request_id:
            return hold
        return Hold(key, hold.request_id, is_inherited=True)

    async def renew(self, holds: Sequence[Hold]) -> None:
        """Say that *holds* are still worked on."""
        parameters = {
            "key_ids": [hold.key.key_id for hold in holds],
            "idempotency_keys": [hold.key.kept_as for hold in holds],
            "request_ids": [hold.request_id for hold in holds],
            "gateway_id": self.gateway_id,
        }
        async with self._database.transaction() as session:
            await session.execute(_RENEW, parameters)

    async def complete(self, hold: Hold, state: State, answer: KeptAnswer) -> None:
        """Keep the answer, or, without its body, the note that it was too large to be kept. Idempotent."""
        values = {
            "gateway_id": self.gateway_id,
            "request_id": hold.request_id,
            "state": state,
            "status": answer.status,
            "content_type": answer.head.decode("latin-1"),
            "body": answer.body,
            "kept": self._kept,
        }
        async with self._database.transaction() as session:
            await session.execute(_COMPLETE, hold.key.named(**values))

    async def release(self, key: ClaimKey, *request_ids: str) -> None:
        """Give a claim up that goes by one of *request_ids*: the next request with that key is the first again."""
        async with self._database.transaction() as session:
            await session.execute(_RELEASE, key.named(gateway_id=self.gateway_id, request_ids=list(request_ids)))

    async def hand_back(self, hold: Hold) -> None:
        """Give up a claim that was inherited and led to no call: the next request inherits it in turn."""
        async with self._database.transaction() as session:
            values = hold.key.named(gateway_id=self.gateway_id, request_id=hold.request_id)
            await session.execute(_HAND_BACK, values)

    async def _take(self, statement: Any, key: ClaimKey, values: dict[str, Any]) -> Hold | None:
        async with self._database.transaction() as session:
            row = (await session.execute(statement, key.named(gateway_id=self.gateway_id, **values))).one_or_none()
        return None if row is None else Hold(key, row.request_id)


async def prune(database: Database) -> int:
    """Delete what has expired, a thousand at a time; return how many rows. Errors: those of `core.database.DOWN`."""
    count = 0
    while True:
        async with database.transaction() as session:
            pruned = len((await session.execute(_PRUNE)).all())
        count += pruned
        if pruned < 1000:
            return count
