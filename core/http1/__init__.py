"""Our own HTTP/1.1 client, for requests that are many: calls of models and webhooks (decision 0002).

Owns: connections, their pools, framing, deadlines, back-pressure, proxies. Does not own: what is asked of whom.
Imports nothing of ours.
"""
