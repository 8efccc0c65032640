"""What `aap doctor` looks at of billing. Nothing is asked of Stripe."""

from __future__ import annotations

from core.clock import SystemClock
from core.database import Database
from core.settings import StripeSettings
from gateway.cli.findings import Finding
from metering.billing import agreement
from metering.billing.catalog_ids import sold_at
from metering.billing.plans import Plans


async def examine_stripe(database: Database, settings: StripeSettings, plans: Plans) -> Finding:
    """Say whether what is sold can be bought, whether Stripe can tell us of it, and whether anything stands between."""
    if settings.api_key is None:
        sold = [plan.name for plan in plans if plan.is_sold]
        if sold:
            return Finding("stripe", "warning", f"STRIPE_API_KEY is not set: nobody can buy {', '.join(sold)}")
        return Finding("stripe", "ok", "not used")
    mode = "live" if "_live_" in settings.api_key else "test"
    if not settings.webhook_secrets:
        return Finding("stripe", "warning", f"{mode} key, no STRIPE_WEBHOOK_SECRET: changes are seen 10 minutes late")
    async with database.transaction() as session:
        known = await sold_at(session)
        missing = [plan.name for plan in plans if plan.is_sold and plan.name not in known.plans]
        if missing:
            return Finding("stripe", "warning", f"not for sale yet: {', '.join(missing)}; run `aap stripe sync`")
        seen = await agreement.reconciliation(session, SystemClock().now())
    if not seen.agrees:
        return Finding("stripe", "warning", "something stands between the ledger and Stripe: see `aap stripe status`")
    return Finding("stripe", "ok", f"{mode} key, {len(known.plans)} plans for sale")
