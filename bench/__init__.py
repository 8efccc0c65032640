"""Measures what the gateway costs, beside what it could cost at best and beside its peers.

Owns a mock provider, a load generator, a look into /proc, and the tables. Everything stays on loopback
and ends by itself.
Imports nothing of the gateway but its HTTP server and client (bench/bare_relay.py); nothing imports it.
"""
