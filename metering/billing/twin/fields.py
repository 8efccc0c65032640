"""Parameters as Stripe's clients send them: nested form keys, or JSON; read by name, refused in Stripe's words."""

from __future__ import annotations

import re
from typing import Any, cast
from urllib.parse import parse_qsl

from metering.billing.twin.errors import Object, invalid, missing

_KEY_PARTS = re.compile(r"\[([^\[\]]*)\]")
_NESTING_MAX = 12
MOMENT_MAX = 4_102_444_800


def decode_form(text: str) -> Object:
    """Turn `a[b][0][c]=x` into nested dicts and lists; `a[]=x` appends."""
    tree: Object = {}
    for key, value in parse_qsl(text, keep_blank_values=True):
        root, bracket, _ = key.partition("[")
        parts = [root, *_KEY_PARTS.findall(key)] if bracket else [key]
        if len(parts) > _NESTING_MAX:
            raise invalid(root, "Parameters are nested too deeply.")
        _plant(tree, parts, value)
    return {name: _as_lists(value) for name, value in tree.items()}


def _plant(tree: Object, parts: list[str], value: str) -> None:
    branch = tree
    for part in parts[:-1]:
        name = part or str(len(branch))
        held = branch.get(name)
        if not isinstance(held, dict):
            held = branch[name] = {}
        branch = cast("Object", held)
    branch[parts[-1] or str(len(branch))] = value


def _as_lists(tree: Any) -> Any:
    """A branch whose keys count from 0 was a list."""
    if not isinstance(tree, dict):
        return tree
    branch = cast("Object", tree)
    if branch and list(branch) == [str(index) for index in range(len(branch))]:
        return [_as_lists(value) for value in branch.values()]
    return {key: _as_lists(value) for key, value in branch.items()}


class Fields:
    """One level of parameters. Reading gives None for what was not sent; the empty string clears a value."""

    def __init__(self, values: Object, path: str = "") -> None:
        self.values = values
        self._path = path

    def name_of(self, name: str) -> str:
        """How a refusal names the parameter: `items[0][price]`."""
        return f"{self._path}[{name}]" if self._path else name

    def has(self, name: str) -> bool:
        """Whether it was sent, be it empty."""
        return name in self.values

    def string(self, name: str) -> str | None:
        """The string; None when it was not sent or was cleared."""
        value = self.values.get(name)
        if value is None or value == "":
            return None
        if isinstance(value, dict | list):
            raise invalid(self.name_of(name), f"Invalid string: {self.name_of(name)}")
        return str(value)

    def must(self, name: str) -> str:
        """The string, which has to be there."""
        value = self.string(name)
        if value is None:
            raise missing(self.name_of(name))
        return value

    def one_of(self, name: str, *allowed: str) -> str | None:
        """One of the *allowed* words."""
        value = self.string(name)
        if value is not None and value not in allowed:
            listed = ", ".join(allowed)
            raise invalid(self.name_of(name), f"Invalid {self.name_of(name)}: must be one of {listed}")
        return value

    def whole(self, name: str) -> int | None:
        """The integer."""
        value = self.string(name)
        if value is None:
            return None
        if not re.fullmatch(r"-?\d{1,18}", value):
            raise invalid(self.name_of(name), f"Invalid integer: {value}", "parameter_invalid_integer")
        return int(value)

    def moment(self, name: str) -> int | None:
        """The time in Unix seconds. Errors: 400 beyond the year 2100: calendar arithmetic has to end somewhere."""
        value = self.whole(name)
        if value is not None and not 0 <= value <= MOMENT_MAX:
            raise invalid(self.name_of(name), f"Invalid timestamp: {value}", "parameter_invalid_integer")
        return value

    def must_moment(self, name: str) -> int:
        """The time, which has to be there."""
        value = self.moment(name)
        if value is None:
            raise missing(self.name_of(name))
        return value

    def must_whole(self, name: str) -> int:
        """The integer, which has to be there."""
        value = self.whole(name)
        if value is None:
            raise missing(self.name_of(name))
        return value

    def flag(self, name: str) -> bool | None:
        """The boolean, sent as `true` or `false`."""
        value = self.values.get(name)
        if value is None or value == "":
            return None
        word = str(value).lower()
        if word not in {"true", "false"}:
            raise invalid(self.name_of(name), f"Invalid boolean: {value}")
        return word == "true"

    def inner(self, name: str) -> Fields:
        """The parameters below *name*; none when it was not sent."""
        value = self.values.get(name)
        if value is None or value == "":
            return Fields({}, self.name_of(name))
        if not isinstance(value, dict):
            raise invalid(self.name_of(name), f"Invalid object: {self.name_of(name)}")
        return Fields(cast("Object", value), self.name_of(name))

    def rows(self, name: str) -> list[Fields]:
        """The list of parameter groups below *name*."""
        listed = self._list(name)
        path = self.name_of(name)
        if not all(isinstance(value, dict) for value in listed):
            raise invalid(path, f"Invalid array: {path}")
        return [Fields(cast("Object", value), f"{path}[{index}]") for index, value in enumerate(listed)]

    def strings(self, name: str) -> list[str]:
        """The list of strings below *name*."""
        return [str(value) for value in self._list(name)]

    def pairs(self, name: str) -> dict[str, str]:
        """A map of strings, such as metadata; numbered keys were not a list here."""
        value = self.values.get(name)
        if isinstance(value, list):
            return {str(index): str(one) for index, one in enumerate(cast("list[Any]", value))}
        return {key: str(one) for key, one in self.inner(name).values.items()}

    def _list(self, name: str) -> list[Any]:
        value = self.values.get(name)
        if value is None or value == "":
            return []
        if not isinstance(value, list):
            raise invalid(self.name_of(name), f"Invalid array: {self.name_of(name)}")
        return cast("list[Any]", value)


def merge_metadata(held: dict[str, str], fields: Fields) -> dict[str, str]:
    """Stripe merges metadata: an empty value removes its key, an empty `metadata` removes all."""
    if fields.values.get("metadata") == "":
        return {}
    merged = held | fields.pairs("metadata")
    return {key: value for key, value in merged.items() if value}
