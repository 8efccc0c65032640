"""What happens at Stripe without being asked for: periods, usage, invoices, payments, credits, entitlements.

Owns the rules of time and money of the twin; knows no HTTP and no routes (`resources/` does).
"""
