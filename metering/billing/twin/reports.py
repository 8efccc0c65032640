"""What went wrong with meter events after they were accepted, gathered until it is reported."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from metering.billing.twin.errors import Object

# Stripe names a few of the events that failed, never all.
SAMPLES_MAX = 5


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """One meter event that could not be counted. *meter* is empty when no meter has its name."""

    meter: str
    code: str
    identifier: str
    message: str
    at: int


class Reports:
    """Failures since the last report."""

    def __init__(self) -> None:
        self._failures: list[Failure] = []

    def add(self, failure: Failure) -> None:
        """Keep *failure* for the next report."""
        self._failures.append(failure)

    def take_until(self, at: int) -> dict[str, list[Failure]]:
        """Take the failures up to *at*, by meter."""
        taken: dict[str, list[Failure]] = defaultdict(list)
        for failure in self._failures:
            if failure.at <= at:
                taken[failure.meter].append(failure)
        self._failures = [failure for failure in self._failures if failure.at > at]
        return taken


def summarised(failures: list[Failure]) -> Object:
    """The `reason` of an error report: counts by code, sample identifiers only."""
    by_code: dict[str, list[Failure]] = defaultdict(list)
    for failure in failures:
        by_code[failure.code].append(failure)
    kinds: list[Object] = [
        {
            "code": code,
            "error_count": len(found),
            "sample_errors": [
                {"error_message": one.message, "request": {"identifier": one.identifier}} for one in found[:SAMPLES_MAX]
            ],
        }
        for code, found in by_code.items()
    ]
    return {"error_count": len(failures), "error_types": kinds}
