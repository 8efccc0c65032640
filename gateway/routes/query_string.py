"""Query strings: read strictly into a Struct, and described from the same Struct in `/openapi.json`.

A parameter that is not known is refused by name. Ignored, a mistyped filter would answer with everybody's numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, cast
from urllib.parse import parse_qsl

import msgspec
from litestar import Request
from litestar.openapi.spec import Operation, Parameter, Schema
from litestar.openapi.spec.enums import OpenAPIType

from core.errors import Invalid
from keys.secrets import redact

_Form = TypeVar("_Form", bound=msgspec.Struct)
_FAULT: Final = re.compile(r"(?P<reason>.*?)(?: - at `\$\.(?P<name>\w+).*)?", re.DOTALL)
_NAME_MAX: Final = 64


class UnknownParameter(Invalid):
    """A parameter of the query that the route does not take."""

    code = "unknown_parameter"

    def __init__(self, name: str) -> None:
        # What was sent in the wrong place may be a key.
        shown = redact(name)[:_NAME_MAX]
        super().__init__(f"Unknown parameter: '{shown}'.", param=shown)


class MissingParameter(Invalid):
    """A parameter of the query that the route cannot do without."""

    code = "missing_required_parameter"

    def __init__(self, name: str) -> None:
        super().__init__(f"Missing required parameter: '{name}'.", param=name)


def read_query(request: Request[Any, Any, Any], form: type[_Form]) -> _Form:
    """Return the query as a *form*, whose lists are empty by default.

    A list comes as `name=a&name=b`, or as official clients send it: `name[]=a`.
    Errors: UnknownParameter, MissingParameter, Invalid for what is malformed or there twice.
    """
    fields = {field.name: field for field in msgspec.structs.fields(form)}
    found: dict[str, Any] = {}
    for sent, value in _pairs(request.scope["query_string"]):
        name = sent.removesuffix("[]")
        if name not in fields or (sent != name and not _is_list(fields[name])):
            raise UnknownParameter(sent)
        if _is_list(fields[name]):
            found.setdefault(name, []).append(value)
        elif name in found:
            raise Invalid(f"Invalid '{name}': it is there twice.", param=name)
        else:
            found[name] = value
    for name, field in fields.items():
        if field.required and name not in found:
            raise MissingParameter(name)
    try:
        return msgspec.convert(found, form, strict=False)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None


def described_by(form: type[msgspec.Struct]) -> type[Operation]:
    """Return the operation of a route that reads its query as a *form*, for `/openapi.json`."""
    _, components = msgspec.json.schema_components([form], ref_template="{name}")
    described: Mapping[str, Any] = components[form.__name__]
    required = described.get("required", ())
    parameters = [
        Parameter(name=name, param_in="query", required=name in required, schema=_schema(schema))
        for name, schema in described["properties"].items()
    ]

    @dataclass
    class Described(Operation):
        def __post_init__(self) -> None:
            self.parameters = [*(self.parameters or ()), *parameters]
            self.security = [{"bearer": []}]

    return Described


def _pairs(query: bytes) -> list[tuple[str, str]]:
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, errors="strict")
    except ValueError:
        raise Invalid("Invalid query: expected name=value&name=value in UTF-8.") from None
    if any("\0" in value for _, value in pairs):
        # PostgreSQL knows no text with it.
        raise Invalid("Invalid query: a value holds the character NUL.")
    return pairs


def _is_list(field: msgspec.structs.FieldInfo) -> bool:
    return field.default == ()


def _invalid(fault: str) -> Invalid:
    found = _FAULT.fullmatch(fault)
    assert found is not None
    name = found["name"]
    return Invalid(f"Invalid '{name}': {found['reason']}." if name else f"Invalid query: {fault}.", param=name)


def _schema(described: Mapping[str, Any]) -> Schema:
    options = cast("list[Mapping[str, Any]]", described.get("anyOf", []))
    for option in options:
        if option.get("type") != "null":
            return _schema({**option, "description": described.get("description")})
    kind = described.get("type", "string")
    return Schema(
        type=OpenAPIType(kind),
        enum=described.get("enum"),
        items=_schema(described["items"]) if "items" in described else None,
        default=described.get("default") if kind != "array" else None,
        minimum=described.get("minimum"),
        maximum=described.get("maximum"),
        description=described.get("description"),
    )
