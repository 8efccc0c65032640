"""All routes of the twin."""

from __future__ import annotations

from metering.billing.twin.resources import (
    checkout,
    credit_grants,
    customers,
    entitlements,
    events,
    invoices,
    meter_events,
    meter_stream,
    meters,
    payments,
    portal,
    products,
    subscription_items,
    subscriptions,
    test_clocks,
)

ROUTES = [
    *products.ROUTES,
    *meters.ROUTES,
    *meter_events.ROUTES,
    *meter_stream.ROUTES,
    *customers.ROUTES,
    *subscriptions.ROUTES,
    *subscription_items.ROUTES,
    *invoices.ROUTES,
    *checkout.ROUTES,
    *portal.ROUTES,
    *payments.ROUTES,
    *credit_grants.ROUTES,
    *entitlements.ROUTES,
    *events.ROUTES,
    *test_clocks.ROUTES,
]
