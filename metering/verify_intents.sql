-- Intents that should not be there any more. $1: how many at most    $2: how old is too old
--
-- A running call is checkpointed every two seconds. One that has not been for long is entered already, its gateway is
-- dead, or its gateway has forgotten it: a worker should have settled it. (A PostgreSQL that has just come up has not
-- heard of anybody for a while.)

SELECT i.request_id, i.gateway_id, i.checkpoint_at, e.request_id IS NOT NULL AS is_entered
FROM usage_intents i LEFT JOIN ledger_entries e ON e.request_id = i.request_id AND e.kind = 'usage' AND e.seq = 0
WHERE greatest(i.checkpoint_at, pg_postmaster_start_time()) < now() - $2::interval
ORDER BY i.request_id
LIMIT $1
