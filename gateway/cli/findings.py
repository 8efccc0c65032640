"""What `aap doctor` says of one thing."""

from __future__ import annotations

from typing import Literal

import msgspec


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    check: str
    result: Literal["ok", "warning", "failed"]
    detail: str
