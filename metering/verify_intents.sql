-- Intents that should not be there: their calls are entered, or their gateways dead, for longer than :overdue.

SELECT i.request_id, i.gateway_id, i.checkpoint_at, e.request_id IS NOT NULL AS is_entered
FROM usage_intents i
LEFT JOIN gateway_leases l USING (gateway_id)
LEFT JOIN ledger_entries e ON e.request_id = i.request_id AND e.kind = 'usage' AND e.seq = 0
WHERE greatest(i.checkpoint_at, CASE WHEN e.request_id IS NULL THEN l.seen_at END) < now() - :overdue
ORDER BY i.request_id
LIMIT :rows_max
