-- Budgets whose spending is not the sum of the windows of their scope and period. $1: how many at most
--
-- From the period on in which the budget was made: what was charged in it before is counted then, what comes late for an
-- earlier one is counted alone. (A minute more, since it is made when a lock is had and dated from when it was wanted.)

WITH charged AS (
  SELECT
    b.id AS budget_id,
    CASE b.period WHEN 'total' THEN timestamptz 'epoch' ELSE date_trunc(b.period, w.starts_at, 'UTC') END AS starts_at,
    sum(w.charge_nano_usd)::int8 AS charged
  FROM budgets b JOIN spend_windows w ON w.organization_id = b.organization_id AND w.seconds = 3600
    AND b.scope_id = CASE b.scope WHEN 'key' THEN w.key_id WHEN 'project' THEN w.project_id ELSE w.organization_id END
  GROUP BY 1, 2
)
SELECT
  budget_id, starts_at, coalesce(c.charged, 0) AS expected, coalesce(p.spent_nano_usd, 0) AS found
FROM charged c FULL JOIN budget_periods p USING (budget_id, starts_at) JOIN budgets b ON b.id = budget_id
WHERE coalesce(c.charged, 0) <> coalesce(p.spent_nano_usd, 0)
  AND (b.period = 'total' OR starts_at >= date_trunc(b.period, b.created_at + interval '1 minute', 'UTC'))
ORDER BY starts_at, budget_id
LIMIT $1
