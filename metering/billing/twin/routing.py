"""Routes: a method, a path with names in braces, and the function that answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

import msgspec

from metering.billing.twin.errors import Object
from metering.billing.twin.fields import Fields
from metering.billing.twin.world import World

Access = Literal["key", "session_token"]


class Call(msgspec.Struct, kw_only=True):
    """A decoded request: the names of its path, its parameters, and the bearer that was checked."""

    names: dict[str, str]
    fields: Fields
    url: str
    bearer: str = ""

    @property
    def id(self) -> str:
        """The path's `{id}`."""
        return self.names["id"]


Answerer = Callable[[World, Call], Object]


class Route(msgspec.Struct, frozen=True, kw_only=True):
    """One route of the API."""

    method: str
    path: str
    answer: Answerer
    access: Access = "key"

    @property
    def pattern(self) -> re.Pattern[str]:
        """The path as an expression."""
        return re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", self.path))


def get(path: str, answer: Answerer) -> Route:
    """A route that reads."""
    return Route(method="GET", path=path, answer=answer)


def post(path: str, answer: Answerer, access: Access = "key") -> Route:
    """A route that changes something."""
    return Route(method="POST", path=path, answer=answer, access=access)


def delete(path: str, answer: Answerer) -> Route:
    """A route that removes something."""
    return Route(method="DELETE", path=path, answer=answer)


class Router:
    """Finds the route of a path; routes without names in them are found first."""

    def __init__(self, routes: list[Route]) -> None:
        self._exact = {(route.method, route.path): route for route in routes if "{" not in route.path}
        self._patterns = [(route.pattern, route) for route in routes if "{" in route.path]

    def find(self, method: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The route and the names in its path."""
        if exact := self._exact.get((method, path)):
            return exact, {}
        for pattern, route in self._patterns:
            if route.method == method and (found := pattern.fullmatch(path)):
                return route, found.groupdict()
        return None
