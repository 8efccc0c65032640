"""Contracts with Stripe: what our code asked is typed as the stripe package types it, and the twin's answers are whole.

`check_requests(twin)` and `check_answers(twin)` read the twin's journal and fail with all problems at once.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any, ForwardRef, Literal, Union, get_args, get_origin

import typing_extensions
from stripe import StripeObject

from metering.billing.twin.app import Twin
from metering.billing.twin.journal import Entry
from metering.billing.twin.shapes import EXAMPLES
from tests.harness.stripe_schema import hints_of, nameless, object_class, parameter_classes

_WHOLE = re.compile(r"-?\d+")


def check_requests(twin: Twin, *, only_accepted: bool = False) -> None:
    """Fail unless each journalled request fits the parameter types of its route; *only_accepted* skips refused ones."""
    problems = [
        f"{entry.method} {entry.path}: {problem}"
        for entry in twin.journal.entries
        if entry.route and not (only_accepted and entry.status >= 400)
        for problem in request_problems(entry)
    ]
    assert not problems, "\n".join(problems)


def request_problems(entry: Entry) -> list[str]:
    """What is wrong with the parameters of one request."""
    route = entry.method, nameless(entry.route)
    if route not in parameter_classes():
        return [f"the stripe package has no {entry.method} {entry.route}"]
    expected = parameter_classes()[route]
    if expected is None:
        return [f"{name}: no parameters are known" for name in entry.params]
    return list(_dict_problems(entry.params, expected, "", is_form=not entry.path.startswith("/v2/")))


def _dict_problems(value: Any, typed_dict: Any, path: str, *, is_form: bool) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{path}: {value!r} is not an object"
        return
    hints = hints_of(typed_dict)
    for name, inner in value.items():
        if name not in hints:
            yield f"{path}{name}: unknown"
        else:
            yield from _problems(inner, hints[name], f"{path}{name}", is_form=is_form)
    for name, hint in hints.items():
        # Lists without members cannot be told from absent ones in a form.
        if name not in value and not _may_be_absent(hint) and typed_dict.__total__:
            yield f"{path}{name}: missing"


def _may_be_absent(hint: Any) -> bool:
    return get_origin(hint) in {typing.NotRequired, typing_extensions.NotRequired}


def _problems(value: Any, hint: Any, path: str, *, is_form: bool) -> list[str]:  # noqa: PLR0911 - one per form of type
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {typing.NotRequired, typing_extensions.NotRequired, typing.Required, typing_extensions.Required}:
        return _problems(value, arguments[0], path, is_form=is_form)
    if origin in {Union, types.UnionType}:
        # A wrong map is told as such, and not as a wrong word.
        fitting = [one for one in _closed(arguments) if not (isinstance(value, dict) and get_origin(one) is Literal)]
        tried = [_problems(value, one, path, is_form=is_form) for one in fitting or arguments]
        return [] if [] in tried else min(tried, key=len)
    if origin is Literal:
        words = [str(one).lower() if isinstance(one, bool) else str(one) for one in arguments]
        return [] if str(value) in words else [f"{path}: {value!r} is none of {words[:8]}"]
    if origin is list:
        if not isinstance(value, list):
            return [f"{path}: {value!r} is not a list"]
        inner = arguments[0]
        return [
            one
            for index, item in enumerate(value)
            for one in _problems(item, inner, f"{path}[{index}]", is_form=is_form)
        ]
    if origin is dict or _is_untyped(origin or hint):
        inner = arguments[-1] if arguments else Any
        if not isinstance(value, dict):
            return [f"{path}: {value!r} is not a map"]
        return [one for key, item in value.items() for one in _problems(item, inner, f"{path}.{key}", is_form=is_form)]
    if typing_extensions.is_typeddict(hint):
        return list(_dict_problems(value, hint, f"{path}.", is_form=is_form))
    return [] if _is_of(value, hint, is_form=is_form) else [f"{path}: {value!r} is not {hint}"]


def _closed(arguments: tuple[Any, ...]) -> list[Any]:
    """Stripe's words are "open" for the package's sake (`Literal[…] | str`); here a word that it lacks is a typo."""
    words = [word for one in arguments if get_origin(one) is Literal for word in get_args(one) if word != ""]
    return [one for one in arguments if not (one is str and words)]


def _is_untyped(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, StripeObject)


def _is_of(value: Any, hint: Any, *, is_form: bool) -> bool:  # noqa: PLR0911 - one per form of type
    if hint is Any:
        return True
    if hint is type(None):
        return value is None
    if not is_form:
        return isinstance(value, Decimal | str if hint is Decimal else hint)
    if not isinstance(value, str):
        return False
    match hint:
        case _ if hint is bool:
            return value in {"true", "false"}
        case _ if hint is int:
            return _WHOLE.fullmatch(value) is not None
        case _ if hint in {float, Decimal}:
            return _is_decimal(value)
        case _:
            return hint is str


def _is_decimal(value: str) -> bool:
    try:
        return Decimal(value).is_finite()
    except InvalidOperation:
        return False


def check_answers(twin: Twin) -> None:
    """Fail unless each journalled success has all of Stripe's fields and becomes the package's class without holes."""
    problems = {
        f"{entry.method} {entry.route}: {problem}"
        for entry in twin.journal.entries
        if entry.status == 200 and entry.answer is not None and not twin.options.older_shapes
        for problem in answer_problems(entry.answer)
    }
    problems |= {
        f"event {event['type']}: {problem}"
        for event in twin.state.tables["event"].values()
        if not twin.options.older_shapes
        for problem in answer_problems(event["data"]["object"])
    }
    assert not problems, "\n".join(sorted(problems))


def answer_problems(answer: Any, path: str = "") -> Iterator[str]:
    """What is wrong with an answer, and with the objects inside it."""
    if isinstance(answer, list):
        for item in answer:
            yield from answer_problems(item, path)
        return
    if not isinstance(answer, dict):
        return
    kind = answer.get("object")
    if isinstance(kind, str) and kind != "list" and not answer.get("deleted") and not _is_reference(answer):
        yield from _object_problems(answer, kind, f"{path}{kind}")
    for name, inner in answer.items():
        yield from answer_problems(inner, f"{path}{name}.")


def _is_reference(answer: dict[str, Any]) -> bool:
    """`{"object": "price", "id": …}` inside another object is all that Stripe says there."""
    return answer.keys() <= {"object", "id"}


def _object_problems(answer: dict[str, Any], kind: str, path: str) -> Iterator[str]:
    expected = EXAMPLES.get(kind)
    if expected is None and not kind.startswith("v2."):
        yield f"{path}: no example of Stripe's"
        return
    yield from (f"{path}.{name}: missing" for name in (expected or {}) if name not in answer and _is_due(answer, name))
    made = object_class(kind)
    if made is StripeObject:
        yield f"{path}: the stripe package has no class for it"
        return
    yield from _holes(answer, made, path)


def _is_due(answer: dict[str, Any], name: str) -> bool:
    """A metered item has no quantity."""
    return not (answer["object"] == "subscription_item" and name == "quantity")


def _holes(value: dict[str, Any], made: Any, path: str) -> Iterator[str]:
    """The fields that the class says are never null, and are."""
    for name, hint in made.__annotations__.items():
        if name.startswith("_") or _is_nullable(hint):
            continue
        if value.get(name) is None:
            yield f"{path}.{name}: null, and is {hint}"
        elif isinstance(hint, type) and issubclass(hint, StripeObject) and isinstance(value[name], dict):
            yield from _holes(value[name], hint, f"{path}.{name}")


def _is_nullable(hint: Any) -> bool:
    if isinstance(hint, str | ForwardRef):
        return "Optional[" in str(hint)
    origin = get_origin(hint)
    if origin is typing.ClassVar or hint is Any:
        return True
    return origin in {Union, types.UnionType} and type(None) in get_args(hint)
