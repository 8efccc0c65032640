"""What we tell our customers' servers: events in the Standard Webhooks form, signed, delivered until they are taken.

Owns: endpoints and their secrets, event types, the outbox of events, deliveries and their attempts, the worker.
Does not own: what happened (whoever did it publishes it, in the same transaction), HTTP routes, the egress guard.
May import: `core`, `keys`.
"""
