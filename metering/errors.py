"""What can go wrong with usage and money.

AppError
├── Forbidden
│   └── PriceUnknown        nobody can tell what the call would cost, and a hard budget holds
├── Invalid
│   ├── AdjustmentInvalid       of nothing, of too much, or without a reason
│   └── PriceListUnreadable     no file, or none that holds prices
├── NotFound
│   └── EntryNotFound           no such call in the ledger, or in a month that was archived
└── Unavailable
    └── LedgerUnavailable   what is used cannot be written down just now: nothing is served that is not
"""

from __future__ import annotations

from core.errors import Forbidden, Invalid, NotFound, Unavailable


class PriceUnknown(Forbidden):
    """A hard budget holds, and the model has no price, or none for what the request asks for."""

    code = "model_not_priced"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model `{model}` cannot be used under a hard budget: what this request may cost is not known.",
            param="model",
        )


class AdjustmentInvalid(Invalid):
    """A correction or credit cannot be entered as it was asked for."""

    code = "adjustment_invalid"


class EntryNotFound(NotFound):
    """The ledger holds no such call: it never ran, still runs, or its month was archived."""

    code = "ledger_entry_not_found"

    def __init__(self) -> None:
        super().__init__("There is no entry of such a request: is it still running, or archived?")


class PriceListUnreadable(Invalid):
    """There is no such file, or it holds no prices. For operators: the message names the file."""

    code = "price_list_unreadable"


class LedgerUnavailable(Unavailable):
    """Usage cannot be made durable: no call is admitted that nobody would be billed for."""

    code = "ledger_unavailable"

    def __init__(self) -> None:
        super().__init__("Usage cannot be recorded just now. Please try again.", retry_after_seconds=1)
