-- Write down which calls are about to reach a provider. A further attempt at another deployment replaces the row of the
-- first one. As in metering/settle.sql, what many calls have in common ($7) is sent once.

INSERT INTO usage_intents (
  request_id, gateway_id, started_at,
  prompt_tokens, reserved_nano_usd, organization_id, project_id, key_id, secret_id, model, deployment,
  operation, price_id, charge_price_id, images, audio_seconds
)
SELECT
  request_id, $1::text, timestamptz 'epoch' + started_ms * interval '1 millisecond',
  prompt_tokens, reserved_nano_usd, organization_id, project_id, key_id, secret_id, model, deployment,
  operation, price_id, charge_price_id, images, audio_seconds
FROM unnest(
  $2::text::text[], $3::text::int8[], $4::text::int4[], $5::text::int8[], $6::text::int8[]
) AS o (request_id, n, prompt_tokens, reserved_nano_usd, started_ms)
JOIN json_to_recordset($7::text::json) AS s (
  n int8, organization_id text, project_id text, key_id text, secret_id text, model text, deployment text,
  operation text, price_id text, charge_price_id text, images int4, audio_seconds int4
) USING (n)
ON CONFLICT (request_id) DO UPDATE SET
  gateway_id = excluded.gateway_id, checkpoint_at = now(),
  prompt_tokens = excluded.prompt_tokens,
  reserved_nano_usd = excluded.reserved_nano_usd,
  organization_id = excluded.organization_id,
  project_id = excluded.project_id,
  key_id = excluded.key_id,
  secret_id = excluded.secret_id,
  model = excluded.model,
  deployment = excluded.deployment,
  operation = excluded.operation,
  price_id = excluded.price_id,
  charge_price_id = excluded.charge_price_id,
  images = excluded.images,
  audio_seconds = excluded.audio_seconds
