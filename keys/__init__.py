"""Who is calling, and how much they may do: tenants, API keys, revocation, rate limits.

Owns organizations, projects, keys and the quota script. Knows no model, no price and no HTTP. Imports `core`.
"""
