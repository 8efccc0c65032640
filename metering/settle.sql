-- Settle a batch of calls. One statement is one transaction: the intents leave, the entries come, and everything that is
-- made of entries grows by exactly those that came. What is sent again finds its entries there and changes nothing.
--
-- What many calls of a batch have in common ($12) is sent once for all of them; each call's own numbers ($1 to $11) name it
-- by its place, n. The order of the arrays is that of `metering/entries.py`; they come as text, which a gateway writes at
-- a fraction of what binary arrays cost it.
--
-- Rows are taken in one order everywhere, so that two who settle the same wait for each other and do not deadlock.

WITH shared AS (
  SELECT * FROM json_to_recordset($12::text::json) AS s (
    n int8, organization_id text, project_id text, key_id text, secret_id text, model text, deployment text,
    operation text, price_id text, charge_price_id text, kind text, seq int2, service_tier text, quality text,
    is_unpriced bool, requests int2, status int2, outcome text, corrects_kind text, corrects_seq int2,
    reported_cost_nano_usd int8, cache_write_tokens int4, cache_write_1h_tokens int4, input_audio_tokens int4,
    input_image_tokens int4, output_audio_tokens int4, output_image_tokens int4, images int4, audio_seconds int4
  )
), settled AS (
  DELETE FROM usage_intents WHERE request_id = ANY (ARRAY(SELECT unnest($1::text::text[])))
), entered AS (
  INSERT INTO ledger_entries (
    request_id, duration_ms, first_byte_ms, cost_nano_usd, charge_nano_usd, input_tokens, cached_input_tokens,
    output_tokens, reasoning_tokens, organization_id, project_id, key_id, secret_id, model, deployment,
    operation, price_id, charge_price_id, kind, seq, service_tier, quality, is_unpriced, requests, status,
    outcome, corrects_kind, corrects_seq, reported_cost_nano_usd, cache_write_tokens, cache_write_1h_tokens,
    input_audio_tokens, input_image_tokens, output_audio_tokens, output_image_tokens, images, audio_seconds,
    occurred_at
  )
  SELECT
    request_id, duration_ms, nullif(first_byte_ms, -1), cost_nano_usd, charge_nano_usd, input_tokens, cached_input_tokens,
    output_tokens, reasoning_tokens, organization_id, project_id, key_id, secret_id, model, deployment,
    operation, price_id, charge_price_id, kind, seq, service_tier, quality, is_unpriced, requests, status,
    outcome, corrects_kind, corrects_seq, reported_cost_nano_usd, cache_write_tokens, cache_write_1h_tokens,
    input_audio_tokens, input_image_tokens, output_audio_tokens, output_image_tokens, images, audio_seconds,
    timestamptz 'epoch' + started_ms * interval '1 millisecond'
  FROM unnest(
    $1::text::text[], $2::text::int8[], $3::text::int8[], $4::text::int4[], $5::text::int4[], $6::text::int8[],
    $7::text::int8[], $8::text::int4[], $9::text::int4[], $10::text::int4[], $11::text::int4[]
  ) AS o (
    request_id, n, started_ms, duration_ms, first_byte_ms, cost_nano_usd, charge_nano_usd, input_tokens,
    cached_input_tokens, output_tokens, reasoning_tokens
  ) JOIN shared USING (n)
  ORDER BY request_id
  ON CONFLICT (request_id, kind, seq) DO NOTHING
  RETURNING *
), summed AS (
  INSERT INTO spend_windows AS w (
    organization_id, project_id, key_id, model, operation, service_tier, seconds, starts_at, unpriced_requests,
    requests, cost_nano_usd, charge_nano_usd, input_tokens, cached_input_tokens, cache_write_tokens,
    cache_write_1h_tokens, input_audio_tokens, input_image_tokens, output_tokens, reasoning_tokens,
    output_audio_tokens, output_image_tokens, images, audio_seconds
  )
  SELECT
    organization_id, project_id, key_id, model, operation, service_tier, width.seconds,
    date_bin(make_interval(secs => width.seconds), occurred_at, timestamptz 'epoch') AS starts_at,
    count(*) FILTER (WHERE is_unpriced),
    sum(requests), sum(cost_nano_usd), sum(charge_nano_usd), sum(input_tokens), sum(cached_input_tokens),
    sum(cache_write_tokens), sum(cache_write_1h_tokens), sum(input_audio_tokens), sum(input_image_tokens),
    sum(output_tokens), sum(reasoning_tokens), sum(output_audio_tokens), sum(output_image_tokens),
    sum(images), sum(audio_seconds)
  FROM entered CROSS JOIN (VALUES (60), (3600)) AS width (seconds)
  GROUP BY organization_id, project_id, key_id, model, operation, service_tier, width.seconds, 8
  ORDER BY organization_id, project_id, key_id, model, operation, service_tier, width.seconds, 8
  ON CONFLICT (organization_id, seconds, starts_at, project_id, key_id, model, operation, service_tier) DO UPDATE SET
    unpriced_requests = w.unpriced_requests + excluded.unpriced_requests,
    requests = w.requests + excluded.requests,
    cost_nano_usd = w.cost_nano_usd + excluded.cost_nano_usd,
    charge_nano_usd = w.charge_nano_usd + excluded.charge_nano_usd,
    input_tokens = w.input_tokens + excluded.input_tokens,
    cached_input_tokens = w.cached_input_tokens + excluded.cached_input_tokens,
    cache_write_tokens = w.cache_write_tokens + excluded.cache_write_tokens,
    cache_write_1h_tokens = w.cache_write_1h_tokens + excluded.cache_write_1h_tokens,
    input_audio_tokens = w.input_audio_tokens + excluded.input_audio_tokens,
    input_image_tokens = w.input_image_tokens + excluded.input_image_tokens,
    output_tokens = w.output_tokens + excluded.output_tokens,
    reasoning_tokens = w.reasoning_tokens + excluded.reasoning_tokens,
    output_audio_tokens = w.output_audio_tokens + excluded.output_audio_tokens,
    output_image_tokens = w.output_image_tokens + excluded.output_image_tokens,
    images = w.images + excluded.images,
    audio_seconds = w.audio_seconds + excluded.audio_seconds
), spent AS (
  INSERT INTO budget_periods AS p (budget_id, starts_at, spent_nano_usd)
  SELECT
    b.id, CASE b.period WHEN 'total' THEN timestamptz 'epoch' ELSE date_trunc(b.period, occurred_at, 'UTC') END,
    sum(charge_nano_usd)
  FROM entered e JOIN budgets b ON b.organization_id = e.organization_id
    AND b.scope_id = CASE b.scope WHEN 'key' THEN e.key_id WHEN 'project' THEN e.project_id ELSE e.organization_id END
  GROUP BY 1, 2
  ORDER BY 1, 2
  ON CONFLICT (budget_id, starts_at) DO UPDATE SET spent_nano_usd = p.spent_nano_usd + excluded.spent_nano_usd
  RETURNING budget_id, starts_at, spent_nano_usd
), told AS (
  INSERT INTO budget_events (
    budget_id, starts_at, threshold_percent, organization_id, spent_nano_usd, limit_nano_usd
  )
  SELECT s.budget_id, s.starts_at, percent, b.organization_id, s.spent_nano_usd, b.limit_nano_usd
  FROM spent s JOIN budgets b ON b.id = s.budget_id CROSS JOIN (VALUES (50), (80), (100)) AS threshold (percent)
  WHERE s.spent_nano_usd::numeric * 100 >= b.limit_nano_usd::numeric * percent
  ON CONFLICT (budget_id, starts_at, threshold_percent) DO NOTHING
  RETURNING *
), listened AS (
  -- Who wants to hear of every call: nearly always nobody, and then this is all that it costs.
  SELECT DISTINCT w.organization_id FROM webhook_endpoints w
  WHERE w.organization_id = ANY (ARRAY(SELECT DISTINCT organization_id FROM entered))
    AND w.event_types @> ARRAY['chat.completed'] AND w.disabled_at IS NULL AND w.deleted_at IS NULL
), chats AS (
  -- Workers look for these by themselves, four times a second: a NOTIFY takes a lock that all commits of all gateways
  -- would queue for.
  INSERT INTO webhook_events (id, organization_id, type, data)
  SELECT 'evt_' || substr(request_id, 5), organization_id, 'chat.completed', json_build_object(
    'request_id', request_id, 'project_id', project_id, 'key_id', key_id, 'model', model, 'operation', operation,
    'status', status, 'outcome', outcome, 'is_estimated', quality <> 'exact',
    'input_tokens', input_tokens, 'cached_input_tokens', cached_input_tokens, 'output_tokens', output_tokens,
    'reasoning_tokens', reasoning_tokens, 'charge_usd', trim_scale(charge_nano_usd::numeric / 1000000000)::text,
    'started_at', floor(extract(epoch FROM occurred_at))::int8, 'duration_ms', duration_ms
  )
  FROM entered JOIN listened USING (organization_id)
  WHERE kind = 'usage' AND seq = 0 AND operation IN ('chat', 'text_completion')
  ON CONFLICT (id) DO NOTHING
), budgets_told AS (
  -- An id like any other: the time of the latest of these calls, and what makes this threshold this one.
  INSERT INTO webhook_events (id, organization_id, type, data)
  SELECT
    'evt_' || substr((SELECT max(request_id) FROM entered), 5, 10)
      || substr(md5(t.budget_id || t.starts_at::text || t.threshold_percent::text), 1, 16),
    t.organization_id, 'budget.threshold_reached', json_build_object(
      'budget_id', t.budget_id, 'scope', b.scope, 'scope_id', b.scope_id, 'period', b.period,
      'period_start', extract(epoch FROM t.starts_at)::int8, 'threshold_percent', t.threshold_percent,
      'spent_usd', trim_scale(t.spent_nano_usd::numeric / 1000000000)::text,
      'limit_usd', trim_scale(t.limit_nano_usd::numeric / 1000000000)::text, 'is_hard', b.is_hard
    )
  FROM told t JOIN budgets b ON b.id = t.budget_id
  ON CONFLICT (id) DO NOTHING
)
SELECT count(*) FROM entered
