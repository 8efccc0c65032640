-- Intents whose gateway is dead, or has forgotten them. $1: a lease in seconds    $2: how many at most
--
-- A PostgreSQL that has just come up has not heard of anybody for a while: it gives them the time of a lease.

SELECT
  i.*,
  (extract(epoch FROM i.started_at) * 1000)::int8 AS started_ms,
  greatest(0, least(extract(epoch FROM i.checkpoint_at - i.started_at) * 1000, 2147483647))::int4 AS duration_ms
FROM usage_intents i LEFT JOIN gateway_leases l USING (gateway_id)
WHERE greatest(l.seen_at, pg_postmaster_start_time(), i.checkpoint_at) < now() - make_interval(secs => $1)
  -- Its gateway lives, and lists all calls that it knows whenever it renews its lease.
  OR i.checkpoint_at < l.seen_at - interval '1 minute'
ORDER BY i.request_id
LIMIT $2
