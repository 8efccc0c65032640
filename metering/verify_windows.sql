-- Windows that are not the sum of their entries. $1: how many at most    $2: for how long minutes are surely kept
--
-- Looked at are hours and minutes whose entries are all here. Left out are archived months, with an hour on either side
-- (a partition goes by when a call's id was made, a window by when the call began), and minutes that may be forgotten,
-- whole or but for a correction that came late.

WITH entered AS (
  SELECT
    organization_id, project_id, key_id, model, operation, service_tier, width.seconds,
    date_bin(make_interval(secs => width.seconds), occurred_at, timestamptz 'epoch') AS starts_at,
    ARRAY[
      sum(requests), count(*) FILTER (WHERE is_unpriced),
      sum(cost_nano_usd), sum(charge_nano_usd), sum(input_tokens), sum(cached_input_tokens),
      sum(cache_write_tokens), sum(cache_write_1h_tokens), sum(input_audio_tokens), sum(input_image_tokens),
      sum(output_tokens), sum(reasoning_tokens), sum(output_audio_tokens), sum(output_image_tokens),
      sum(images), sum(audio_seconds)
    ]::int8[] AS numbers
  FROM ledger_entries CROSS JOIN (VALUES (60), (3600)) AS width (seconds)
  -- From a whole minute on.
  WHERE width.seconds = 3600 OR occurred_at >= date_trunc('minute', now() - $2::interval)
  GROUP BY organization_id, project_id, key_id, model, operation, service_tier, width.seconds, 8
), summed AS (
  SELECT
    organization_id, project_id, key_id, model, operation, service_tier, seconds, starts_at,
    ARRAY[
      requests, unpriced_requests,
      cost_nano_usd, charge_nano_usd, input_tokens, cached_input_tokens, cache_write_tokens,
      cache_write_1h_tokens, input_audio_tokens, input_image_tokens, output_tokens, reasoning_tokens,
      output_audio_tokens, output_image_tokens, images, audio_seconds
    ]::int8[] AS numbers
  FROM spend_windows
  WHERE seconds = 3600 OR starts_at >= date_trunc('minute', now() - $2::interval)
)
SELECT
  organization_id, project_id, key_id, model, operation, service_tier, seconds, starts_at,
  entered.numbers AS expected, summed.numbers AS found
FROM entered FULL JOIN summed
  USING (organization_id, project_id, key_id, model, operation, service_tier, seconds, starts_at)
WHERE entered.numbers IS DISTINCT FROM summed.numbers
  AND NOT EXISTS (
    SELECT FROM ledger_archives a
    WHERE starts_at >= a.month - interval '1 hour'
      AND starts_at < (a.month AT TIME ZONE 'UTC' + interval '1 month' + interval '1 hour') AT TIME ZONE 'UTC'
  )
ORDER BY starts_at, organization_id, project_id, key_id, model, operation, service_tier, seconds
LIMIT $1
