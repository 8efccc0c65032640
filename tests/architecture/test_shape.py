"""Sizes: what fits on a page is read, what does not is scrolled past. An exception is a named entry with a reason."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULE_LINES_MAX = 400
TEST_LINES_MAX = 600
FUNCTION_LINES_MAX = 50
PARAMETERS_MAX = 6
# (file, function) → why it may be larger.
EXCEPTIONS = {
    ("migrations/versions/0001_tenants_and_keys.py", "upgrade"): "a schema is as long as its tables",
    ("migrations/versions/0002_ledger.py", "upgrade"): "a schema is as long as its tables",
    ("migrations/versions/0008_billing.py", "upgrade"): "a schema is as long as its tables",
    ("migrations/versions/0012_webhooks.py", "upgrade"): "a schema is as long as its tables",
    ("gateway/cli/budgets.py", "set_budget"): "one parameter per command line option, as click hands them over",
    ("gateway/cli/keys.py", "create_key"): "one parameter per command line option, as click hands them over",
}


def sources() -> list[Path]:
    folders = ("core", "keys", "webhooks", "metering", "inference", "gateway", "migrations", "bench", "tests")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if ".peers" not in path.parts]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_fits_its_ceilings(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    lines_max = TEST_LINES_MAX if name.startswith("tests/") else MODULE_LINES_MAX
    assert len(path.read_text().splitlines()) <= lines_max
    for function in functions(path):
        if (name, function.name) in EXCEPTIONS:
            continue
        assert (function.end_lineno or 0) - function.lineno + 1 <= FUNCTION_LINES_MAX, function.name
        arguments = function.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        is_method = bool(arguments.args) and arguments.args[0].arg in {"self", "cls"}
        # A test asks for its fixtures by name: that is not an interface.
        if not name.startswith("tests/"):
            assert count - is_method <= PARAMETERS_MAX, function.name


def test_exceptions_are_still_needed() -> None:
    known = {(str(path.relative_to(ROOT)), function.name) for path in sources() for function in functions(path)}
    assert known >= EXCEPTIONS.keys()


def test_every_package_says_what_it_owns() -> None:
    for path in sorted(ROOT.glob("*/__init__.py")):
        if path.parent.name in {"tests", "vendor"}:
            continue
        assert ast.get_docstring(ast.parse(path.read_text())), path
