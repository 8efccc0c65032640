"""JMESPath filters on the data of events: a library's language, within bounds of ours."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import jmespath
import jmespath.exceptions

from webhooks.errors import FilterInvalid

_CHARACTERS_MAX: Final = 1_000


def check_filter(expression: str) -> None:
    """Return if *expression* is a JMESPath expression. Errors: FilterInvalid."""
    if len(expression) > _CHARACTERS_MAX:
        raise FilterInvalid(f"it is longer than {_CHARACTERS_MAX} characters")
    try:
        _compiled(expression)
    except (jmespath.exceptions.JMESPathError, RecursionError) as error:
        # The library draws a line under the place, in lines of its own.
        raise FilterInvalid(str(error).partition("\n")[0] or "it is not understood") from None


def matches(expression: str | None, data: Any) -> bool:
    """Tell whether *data* is what an endpoint wants: everything without an expression.

    As JMESPath has it, false, null, and what is empty are not true. One that fails on this data is not true of it.
    """
    if expression is None:
        return True
    try:
        found = _compiled(expression).search(data)
    except (jmespath.exceptions.JMESPathError, RecursionError, TypeError, ValueError):
        return False
    return found is not None and found is not False and found not in ("", [], {})


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> Any:
    return jmespath.compile(expression)
