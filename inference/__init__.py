"""One governed door to models: what a request asks for, which deployment serves it, and how its bytes come back.

Owns the catalog, routing and upstreams. Knows callers and quotas (`keys`), and no HTTP of ours. Imports `core`, `keys`.
"""
