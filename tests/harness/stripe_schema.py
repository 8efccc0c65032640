"""Stripe's schema, read out of the stripe package: which parameters a route takes, which class an answer becomes.

`python -m tests.harness.stripe_schema` writes the twin's `parameters.json` anew, for a new version of the package.
"""

from __future__ import annotations

import ast
import json
import re
import typing
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import stripe
import typing_extensions
from stripe import _object_classes
from stripe._request_options import RequestOptions

from metering.billing.twin import parameters
from metering.billing.twin.resources.catalogue import ROUTES
from metering.billing.twin.routing import Route

PARAMETERS = Path(parameters.__file__).with_name("parameters.json")

_ROOT = Path(stripe.__file__).parent
_UNIMPORTED = {"StripeContext": Any, "Mapping": Mapping, "RequestOptions": Any}
_NAMES = re.compile(r"\{\w*\}")


def nameless(path: str) -> str:
    """A route's path without the names that differ between the twin and the package: `/v1/customers/{}`."""
    return _NAMES.sub("{}", path)


@cache
def parameter_classes() -> dict[tuple[str, str], Any]:
    """(method, nameless path) → the TypedDict of its parameters; None for a route without parameters."""
    found: dict[tuple[str, str], Any] = {}
    for source in sorted(_ROOT.rglob("*_service.py")):
        tree = ast.parse(source.read_text())
        imported = {
            alias.name: node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and (route := _route_of(function)) is not None:
                found[route] = _class_of(function, imported)
    return found


def _route_of(function: ast.FunctionDef) -> tuple[str, str] | None:
    for node in ast.walk(function):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "_request":
            method, path = node.args[0], node.args[1]
            # "/v1/customers/{customer}".format(…) or the plain path
            literal = path.func.value if isinstance(path, ast.Call) and isinstance(path.func, ast.Attribute) else path
            if isinstance(method, ast.Constant) and isinstance(literal, ast.Constant):
                return str(method.value).upper(), nameless(str(literal.value))
    return None


def _class_of(function: ast.FunctionDef, imported: dict[str, str]) -> Any:
    for argument in function.args.args:
        if argument.arg == "params" and argument.annotation is not None:
            names = re.findall(r"\w+Params\b", ast.unparse(argument.annotation))
            return getattr(import_module(imported[names[0]]), names[0]) if names else None
    return None


@cache
def hints_of(typed_dict: Any) -> dict[str, Any]:
    """The keys of a TypedDict of the package and their types; options of the client itself are left out."""
    # The client's own options are named in every TypedDict and not imported.
    hints = typing.get_type_hints(typed_dict, localns=_UNIMPORTED, include_extras=True)
    own = RequestOptions.__annotations__.keys()
    return {name: hint for name, hint in hints.items() if name not in own}


def object_class(kind: str) -> Any:
    """The class that an answer with `object: kind` becomes."""
    api_mode = "V2" if kind.startswith("v2.") else "V1"
    return _object_classes.get_object_class(api_mode, kind)


# Too large to be vendored, and nothing of it matters to the twin.
_NOT_LOOKED_INTO = {"payment_method_options", "payment_method_data", "payment_details", "amount_details"}


def known_parameters(routes: list[Route]) -> dict[str, Any]:
    """`POST /v1/customers` → the names that it takes, nested, for `parameters.json` of the twin; true is any value."""
    classes = parameter_classes()
    return {
        f"{route.method} {route.path}": _names_in(typed_dict) if typed_dict is not None else {}
        for route in routes
        if (typed_dict := classes.get((route.method, nameless(route.path)), ...)) is not ...
    }


def _names_in(typed_dict: Any) -> dict[str, Any]:
    return {
        name: True if name in _NOT_LOOKED_INTO else _names_below(hint)
        for name, hint in sorted(hints_of(typed_dict).items())
    }


def _names_below(hint: Any) -> dict[str, Any] | bool:
    """The names inside of a value of this type; true if it has none, or may have any."""
    if typing_extensions.is_typeddict(hint):
        return _names_in(hint)
    if typing.get_origin(hint) is dict:
        return True
    below = [_names_below(one) for one in typing.get_args(hint) if not isinstance(one, str)]
    return next((one for one in below if isinstance(one, dict)), True)


def _written() -> str:
    """One line per route: differences between versions of the package can be read."""
    routes = sorted(known_parameters(ROUTES).items())
    lines = (f"{json.dumps(route)}: {json.dumps(names, separators=(',', ':'))}" for route, names in routes)
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    PARAMETERS.write_text(_written())
