"""A stateful stand-in for Stripe, over real HTTP: for tests, and for whoever wants to try billing without an account.

Owns nothing of ours: it knows Stripe's rules and none of our tables. Imports nothing of this project but `core.clock`.
"""
