"""Filters on the data of events: a part of JMESPath, by its library, whose cost is bounded by the filter's length.

Left out is what could make a filter of a thousand characters run for years, or fill the memory, in a worker that all
customers share: projections, lists of more than constants and fields, objects, and functions that build text. The data
of events is flat: what can be asked of it can be asked without.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, Final, cast

import jmespath
import jmespath.exceptions
import jmespath.functions

from webhooks.errors import FilterInvalid

_CHARACTERS_MAX: Final = 1_000
_PARTS: Final = frozenset(
    (
        *("and_expression", "comparator", "current", "field", "function_expression", "identity", "index"),
        *("index_expression", "literal", "multi_select_list", "not_expression", "or_expression", "pipe"),
        "subexpression",
    )
)
# A part takes about two microseconds, for each event and each endpoint.
_PARTS_MAX: Final = 60
_FUNCTIONS: Final = frozenset(
    (
        *("abs", "avg", "ceil", "contains", "ends_with", "floor", "keys", "length", "max", "min", "not_null"),
        *("starts_with", "sum", "to_number", "type", "values"),
    )
)
_ARITIES: Final = {name: found["signature"] for name, found in jmespath.functions.Functions().FUNCTION_TABLE.items()}


def check_filter(expression: str) -> None:
    """Return if *expression* is such a filter. Errors: FilterInvalid."""
    if len(expression) > _CHARACTERS_MAX:
        raise FilterInvalid(f"it is longer than {_CHARACTERS_MAX} characters")
    _compiled(expression)


class Filter:
    """A filter as it is asked of many events: it is compiled for the first."""

    def __init__(self, expression: str) -> None:
        self._expression = expression

    @cached_property
    def _compiled(self) -> Any:
        return _compiled(self._expression)

    def matches(self, data: Any) -> bool:
        """Tell whether *data* is what the endpoint wants.

        As JMESPath has it, false, null, and what is empty are not true. One that fails on this data is not true of it.
        """
        try:
            found = self._compiled.search(data)
        except Exception:  # noqa: BLE001 - whatever one customer's filter does, others' events are delivered
            return False
        return found is not None and found is not False and found not in ("", [], {})


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> Any:
    try:
        compiled = jmespath.compile(expression)
        parts = _check(cast("dict[str, Any]", compiled.parsed), 1)
    except (jmespath.exceptions.JMESPathError, RecursionError) as error:
        # The library draws a line under the place, in lines of its own.
        reason = str(error).partition("\n")[0].removesuffix("for expression:").rstrip(" :.")
        reason = reason.encode("ascii", "backslashreplace").decode()
        raise FilterInvalid(reason or "it is not understood") from None
    if parts > _PARTS_MAX:
        raise FilterInvalid(f"it has {parts} parts, and {_PARTS_MAX} are the most")
    return compiled


def _check(node: dict[str, Any], depth: int) -> int:
    """Return how many parts there are from *node* on. Errors: FilterInvalid."""
    kind = cast("str", node["type"])
    children: list[Any] = [child for child in node["children"] if isinstance(child, dict)]
    if depth > _PARTS_MAX:
        raise FilterInvalid("it is nested too deeply")
    if kind not in _PARTS:
        raise FilterInvalid(f"{kind.replace('_', ' ')}s cannot be used in filters")
    if kind == "multi_select_list" and not all(_is_plain(child) for child in children):
        raise FilterInvalid("a list holds constants and fields only")
    if kind == "function_expression":
        _check_function(node["value"], len(children))
    return 1 + sum(_check(child, depth + 1) for child in children)


def _is_plain(node: dict[str, Any]) -> bool:
    if node["type"] == "subexpression":
        return all(child["type"] in {"field", "subexpression"} and _is_plain(child) for child in node["children"])
    return node["type"] in {"field", "literal"}


def _check_function(name: str, given: int) -> None:
    if name not in _FUNCTIONS:
        raise FilterInvalid(f"the function {name}() is not known, or cannot be used in filters")
    signature = _ARITIES[name]
    is_open_ended = any(argument.get("variadic") for argument in signature)
    if given < len(signature) or (given > len(signature) and not is_open_ended):
        raise FilterInvalid(f"{name}() takes {len(signature)} arguments, not {given}")
