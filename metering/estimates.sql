-- What stands in the ledger for calls ($1) of which a worker made an estimate (outcome $2), what their gateways have
-- corrected included; what an operator adds or takes away (metering/adjustments.py) is apart from what was used. Each is
-- looked up in its month's primary key.

SELECT
  request_id, bool_or(kind = 'adjustment') AS is_corrected,
  sum(cost_nano_usd)::int8 AS cost_nano_usd,
  sum(charge_nano_usd)::int8 AS charge_nano_usd,
  sum(input_tokens)::int8 AS input_tokens,
  sum(cached_input_tokens)::int8 AS cached_input_tokens,
  sum(cache_write_tokens)::int8 AS cache_write_tokens,
  sum(cache_write_1h_tokens)::int8 AS cache_write_1h_tokens,
  sum(input_audio_tokens)::int8 AS input_audio_tokens,
  sum(input_image_tokens)::int8 AS input_image_tokens,
  sum(output_tokens)::int8 AS output_tokens,
  sum(reasoning_tokens)::int8 AS reasoning_tokens,
  sum(output_audio_tokens)::int8 AS output_audio_tokens,
  sum(output_image_tokens)::int8 AS output_image_tokens,
  sum(images)::int8 AS images,
  sum(audio_seconds)::int8 AS audio_seconds
FROM ledger_entries
WHERE request_id = ANY($1) AND (kind = 'usage' OR (kind = 'adjustment' AND seq = 1))
GROUP BY request_id
HAVING bool_or(kind = 'usage' AND outcome = $2)
