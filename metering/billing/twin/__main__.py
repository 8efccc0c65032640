"""`python -m metering.billing.twin`."""

from __future__ import annotations

import argparse
import secrets

from metering.billing.twin.options import Mischief, TwinOptions
from metering.billing.twin.run import RunOptions, run


def parse(arguments: list[str] | None = None) -> RunOptions:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m metering.billing.twin", description="A stand-in for Stripe.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=12_111)
    parser.add_argument("--webhook", help="URL that gets all events")
    parser.add_argument("--webhook-secret", help="its signing secret; made up if not given")
    parser.add_argument("--api-key", default=TwinOptions().api_key)
    parser.add_argument(
        "--requests-per-second", type=int, help="Stripe: 25 in a sandbox, 1000 live; no limit by default"
    )
    parser.add_argument("--aggregation-lag-seconds", type=int, default=0)
    parser.add_argument("--draft-grace-seconds", type=int, default=3_600, help="how long drafts wait for late usage")
    parser.add_argument("--latency-seconds", type=float, default=0.0)
    parser.add_argument("--drop-share", type=float, default=0.0, help="share of webhooks that are lost")
    parser.add_argument("--duplicate-share", type=float, default=0.0, help="share of webhooks that are sent twice")
    parser.add_argument("--reorder-share", type=float, default=0.0, help="share of webhooks that overtake others")
    parser.add_argument("--older-shapes", action="store_true", help="objects as before 2025-03-31.basil")
    parser.add_argument("--seed", type=int, help="draws the ids; a different one for each run by default")
    given = parser.parse_args(arguments)
    mischief = Mischief(
        drop_share=given.drop_share, duplicate_share=given.duplicate_share, reorder_share=given.reorder_share
    )
    twin = TwinOptions(
        api_key=given.api_key,
        webhook_secret=given.webhook_secret,
        # Databases outlive a twin: the next one must not hand out the same ids for other objects.
        seed=secrets.randbits(32) if given.seed is None else given.seed,
        requests_per_second=given.requests_per_second,
        aggregation_lag_seconds=given.aggregation_lag_seconds,
        draft_grace_seconds=given.draft_grace_seconds,
        latency_seconds=given.latency_seconds,
        older_shapes=given.older_shapes,
        mischief=mischief,
    )
    return RunOptions(host=given.host, port=given.port, webhook=given.webhook, twin=twin)


if __name__ == "__main__":
    run(parse())
