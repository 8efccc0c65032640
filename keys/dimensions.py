"""What can be limited, and of whom. Apart from keys/limits.py, so that a line of help need not import Redis."""

from __future__ import annotations

from typing import Final, Literal, get_args

LimitScope = Literal["key", "project", "organization", "model"]
Dimension = Literal[
    "requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day", "concurrent_requests"
]
DIMENSIONS: Final[tuple[Dimension, ...]] = get_args(Dimension)
# Lua counts in doubles. A minute's bucket counts in 1/60,000 of a token (so that a millisecond refills a whole number
# of units) and a day's in 1/86,400 (one second): 10^11 x 86,400 stays below 2^53.
LIMIT_MAX: Final = 10**11

SettableScope = Literal["organization", "project", "key"]
BudgetScope = SettableScope | Literal["credit"]
# credit: what an organization has paid beforehand (metering/billing/prepaid.py). No operator sets it.
BudgetPeriod = Literal["day", "week", "month", "total"]
# Lua counts nano-USD in doubles, exactly up to 2^53 of them: nine million US dollars.
BUDGET_LIMIT_MAX: Final = 9_000_000_000_000_000
