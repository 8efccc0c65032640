-- Entries of usage behind $1, in order, with all that their rating went by. $2: how many at most

SELECT
  request_id, price_id, charge_price_id, service_tier, cost_nano_usd, charge_nano_usd, is_unpriced,
  input_tokens, cached_input_tokens, cache_write_tokens, cache_write_1h_tokens, input_audio_tokens,
  input_image_tokens, output_tokens, reasoning_tokens, output_audio_tokens, output_image_tokens, images,
  audio_seconds
FROM ledger_entries
WHERE request_id > $1 AND kind = 'usage' AND seq = 0
ORDER BY request_id
LIMIT $2
