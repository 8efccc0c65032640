"""Our own HTTP/1.1 server, for asyncio Protocols on both sides of a call (decision 0010).

Owns: connections, framing, keep-alive, time-outs of heads, bounds on what is read, back-pressure, draining.
Does not own: who may call, what is answered. llhttp (through httptools) parses; this package bounds what it accepts.
May import: `core`, `gateway.errors`.
"""
