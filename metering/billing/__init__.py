"""From the ledger to money: plans, what Stripe is told, what Stripe tells, and whether the two agree.

Owns plans, subscriptions, meter reports, the wallet and Stripe's events. Not the ledger itself, which is one floor's
other half (`metering/`), nor HTTP. May import core, keys and metering; `stripe_api.py` alone imports stripe.
"""
