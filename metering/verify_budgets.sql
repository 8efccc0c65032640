-- Budgets whose spending is not the sum of the windows of their scope and period.

SELECT p.budget_id, p.starts_at, coalesce(w.charged, 0)::int8 AS expected, p.spent_nano_usd AS found
FROM budget_periods p
JOIN budgets b ON b.id = p.budget_id
LEFT JOIN LATERAL (
  SELECT sum(charge_nano_usd) AS charged
  FROM spend_windows w
  WHERE w.organization_id = b.organization_id
    AND w.seconds = 3600
    AND w.starts_at >= p.starts_at
    AND (b.period = 'total' OR w.starts_at < date_trunc(b.period, p.starts_at, 'UTC') + CASE b.period
      WHEN 'day' THEN interval '1 day' WHEN 'week' THEN interval '7 days' ELSE interval '1 month' END)
    AND b.scope_id = CASE b.scope WHEN 'key' THEN w.key_id WHEN 'project' THEN w.project_id ELSE w.organization_id END
) AS w ON true
WHERE p.spent_nano_usd <> coalesce(w.charged, 0)
ORDER BY p.starts_at, p.budget_id
LIMIT :rows_max
