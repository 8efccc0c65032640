"""The file `aap.toml`: read, watched, and handed to whoever understands a part of it.

A change is validated whole before any of it takes effect. A file that does not pass leaves everything as it was, and
says why in the log: a typo must not stop a running gateway.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, cast

Tables = dict[str, Any]
_Stamp = tuple[int, ...]
_ABSENT: Final = (0, 0, 0)


class ConfigurationInvalid(Exception):
    """One line per problem in the file."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class ConfigurationFile:
    """Knows whether the file, or a secret that it refers to, changed since it was last read.

    A file that is not there is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: _Stamp | None = None
        self._looked_at: _Stamp | None = None
        self._secrets: list[Path] = []

    def read(self) -> Tables:
        """Return the file's tables. Errors: ConfigurationInvalid when it is not TOML."""
        # Looked at before it is read: what changes while we read is then read again.
        stamp = _stamp_of(self.path)
        self._seen = stamp + self._stamp()[len(stamp) :]
        try:
            tables = tomllib.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise ConfigurationInvalid([f"{self.path.name}: {error}"]) from None
        self._secrets = [Path(text.removeprefix("file:")) for text in _texts(tables) if text.startswith("file:")]
        self._seen = stamp + self._stamp()[len(stamp) :]
        return tables

    def has_changed(self) -> bool:
        """Tell whether the file is another than the one last read, and has come to rest: the same in two looks.

        An editor empties a file before it writes it, and an empty file is valid. One that is gone is not a change.
        """
        stamp = self._stamp()
        is_at_rest = stamp == self._looked_at
        self._looked_at = stamp
        return is_at_rest and stamp not in (self._seen, _ABSENT)

    def _stamp(self) -> _Stamp:
        stamp = _stamp_of(self.path)
        # Without the file itself its secrets mean nothing.
        return stamp if stamp == _ABSENT else sum(map(_stamp_of, self._secrets), stamp)


def _stamp_of(path: Path) -> _Stamp:
    try:
        status = path.stat()
    except OSError:
        return _ABSENT
    return (status.st_mtime_ns, status.st_size, status.st_ino)


def _texts(value: object) -> Iterator[str]:
    """Return every text in *value*, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in cast("dict[str, object]", value).values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in cast("list[object]", value):
            yield from _texts(inner)


def unknown_names(given: Iterable[str], known: Iterable[str], where: str) -> list[str]:
    """Return a line for each name that is not known, with the nearest one that is."""
    known = list(known)
    problems: list[str] = []
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(f"{where}{name}: unknown" + (f", did you mean {near[0]}?" if near else ""))
    return problems


def resolve_secret(value: str, environ: Mapping[str, str]) -> str:
    """Return what `env:NAME` or `file:PATH` refers to, or *value* itself. Errors: ValueError naming the reference."""
    kind, separator, place = value.partition(":")
    if not separator or kind not in {"env", "file"}:
        return value
    if kind == "env":
        found = environ.get(place, "")
        if not found:
            raise ValueError(f"the environment variable {place} is not set")
        return found
    try:
        return Path(place).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"the file {place} cannot be read: {error.strerror}") from None
