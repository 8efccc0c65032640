"""File descriptors: how many a process may have open."""

from __future__ import annotations

import resource


def raise_limit() -> None:
    """Take as many as we may: many systems start a process with 1,024, which is 500 calls, or as many webhooks."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
