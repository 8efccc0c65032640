"""What can go wrong with one upstream exchange, before anybody maps it to an answer for the caller.

    UpstreamError
    ├── ConnectFailed       .phase: "closed", "dns", "refused" (by the guard), "connect", "proxy" or "tls"
    ├── ConnectTimedOut     .phase: "pool" (no free connection), "connect" (network, proxy and TLS together)
    ├── FirstByteTimedOut   the request is sent, the response head did not complete in time
    ├── IdleTimedOut        the body stopped for too long
    ├── TotalTimedOut       the exchange as a whole took too long
    ├── ConnectionLost      .response_started: whether the upstream had sent a byte of its answer
    ├── ProtocolViolated    bad framing, a head too large, an encoding nobody asked for
    └── BodyTooLarge        .bytes_max

The messages name the upstream and the rule; they never contain request headers, request bodies or proxy credentials.
"""

from typing import Literal

ConnectPhase = Literal["closed", "dns", "refused", "connect", "proxy", "tls"]
WaitPhase = Literal["pool", "connect"]


class UpstreamError(Exception):
    """An exchange with an upstream failed; the subclasses say how."""


class ConnectFailed(UpstreamError):
    """No connection came about, so the upstream has seen no byte of the request: trying elsewhere is safe."""

    def __init__(self, message: str, *, phase: ConnectPhase) -> None:
        super().__init__(message)
        self.phase: ConnectPhase = phase


class ConnectTimedOut(UpstreamError):
    """No connection came about in time; as with `ConnectFailed`, the upstream has seen no byte of the request."""

    def __init__(self, message: str, *, phase: WaitPhase) -> None:
        super().__init__(message)
        self.phase: WaitPhase = phase


class FirstByteTimedOut(UpstreamError):
    """The request was sent and the response head did not complete in time; the upstream may have worked on it."""


class IdleTimedOut(UpstreamError):
    """The response body stopped arriving for longer than the idle deadline."""


class TotalTimedOut(UpstreamError):
    """The exchange as a whole, waiting for a connection included, took longer than its deadline."""


class ConnectionLost(UpstreamError):
    """The connection ended before the response did, whether closed or reset."""

    def __init__(self, message: str, *, response_started: bool) -> None:
        super().__init__(message)
        self.response_started = response_started


class ProtocolViolated(UpstreamError):
    """The upstream's bytes are not an HTTP/1.1 response we accept; the connection is closed."""


class BodyTooLarge(UpstreamError):
    """The response body is larger than the reader allows; the connection is closed."""

    def __init__(self, message: str, *, bytes_max: int) -> None:
        super().__init__(message)
        self.bytes_max = bytes_max
