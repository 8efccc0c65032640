"""JMESPath filters on events' data."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from webhooks.errors import FilterInvalid
from webhooks.events import EXAMPLES
from webhooks.filters import Filter, check_filter

DATA: dict[str, Any] = {"name": "orders", "count": 0, "tags": ["a", "b"], "none": None, "nested": {"empty": {}}}


@pytest.mark.parametrize(
    "expression",
    [
        "name == 'orders'",
        'name == `"orders"`',
        "name != 'other'",
        "starts_with(name, 'ord')",
        "contains(tags, 'b')",
        "contains(tags, 'a')",
        "length(tags) == `2`",
        "name == 'orders' && count == `0`",
        "!none",
        "!(name == 'other')",
        "none || name",
        "name",
        # As JMESPath has it, a number is true, nought too.
        "count",
        "@",
    ],
)
def test_what_is_true_is_wanted(expression: str) -> None:
    check_filter(expression)
    assert Filter(expression).matches(DATA) is True


@pytest.mark.parametrize(
    "expression",
    [
        "name == 'other'",
        "!name",
        "missing",
        "missing.further",
        "none",
        "nested.empty",
        "contains(tags, 'z')",
        "tags[9]",
        "''",
        "`false`",
        "count > `0`",
    ],
)
def test_what_is_false_null_or_empty_is_not(expression: str) -> None:
    check_filter(expression)
    assert Filter(expression).matches(DATA) is False


@pytest.mark.parametrize("expression", ["starts_with(count, 'a')", "length(count)", "sum(tags)", "abs(name)"])
def test_an_expression_that_fails_on_this_data_is_not_true_of_it(expression: str) -> None:
    check_filter(expression)
    assert Filter(expression).matches(DATA) is False


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("name ==", "Incomplete expression"),
        ("name == 'a", "Unclosed '"),
        ("", "cannot be empty"),
        ("   ", "Incomplete expression"),
        ("name = 'a'", "Bad jmespath expression"),
        ("a b", "Unexpected token: b"),
        ("#", "Bad jmespath expression"),
        ("x" * 1_001, "longer than 1000 characters"),
        ("(" * 1_000, ""),
        ("!" * 1_000, ""),
    ],
)
def test_what_is_no_expression_is_refused_with_a_reason_on_one_line(expression: str, reason: str) -> None:
    with pytest.raises(FilterInvalid) as raised:
        check_filter(expression)
    assert (raised.value.code, raised.value.param) == ("filter_invalid", "filter")
    assert raised.value.message.startswith("Invalid 'filter': ")
    assert reason in raised.value.message
    assert "\n" not in raised.value.message
    assert len(raised.value.message) < 400


def test_the_longest_expression_is_taken() -> None:
    expression = f"name != '{'x' * 990}'"
    assert len(expression) == 1_000
    check_filter(expression)
    assert Filter(expression).matches(DATA)


@pytest.mark.parametrize("kind", EXAMPLES)
def test_every_field_of_every_event_can_be_asked_for(kind: str) -> None:
    data = msgspec.to_builtins(EXAMPLES[kind])
    for name, value in data.items():
        expression = f"{name} == `{msgspec.json.encode(value).decode()}`"
        check_filter(expression)
        assert Filter(expression).matches(data), expression
        assert not Filter(expression).matches({**data, name: "another"})
