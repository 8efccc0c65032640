"""Stripe's resources, one module each: what a request may say, and what it answers."""
