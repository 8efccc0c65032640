-- Windows that are not the sum of their entries. Only hours and minutes whose entries are all here: those of months that
-- were archived, and minutes that were forgotten, are left out.

WITH kept AS (
  SELECT
    coalesce((SELECT date_trunc('month', min(occurred_at), 'UTC') FROM ledger_entries), 'infinity') AS entries_from,
    coalesce((SELECT min(starts_at) FROM spend_windows WHERE seconds = 60), 'infinity') AS minutes_from
), entered AS (
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
)
SELECT
  organization_id, model, operation, seconds, starts_at, entered.numbers AS expected, summed.numbers AS found
FROM entered FULL JOIN summed
  USING (organization_id, project_id, key_id, model, operation, service_tier, seconds, starts_at)
CROSS JOIN kept
WHERE entered.numbers IS DISTINCT FROM summed.numbers
  AND starts_at >= kept.entries_from
  AND (seconds = 3600 OR starts_at >= kept.minutes_from)
ORDER BY starts_at, organization_id, model, seconds
LIMIT :rows_max
