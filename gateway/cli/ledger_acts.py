"""What `aap ledger` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from gateway.cli.common import fail
from gateway.cli.stores import Stores, chosen_organization, on_stores
from metering.entry_export import OPERATORS, Format, export
from metering.entry_pages import EntryFilter


def export_to(output: Path | None, form: Format, org: str | None, first: datetime | None, last: datetime | None) -> int:
    """Write the entries of a time to *output*, or to standard output; return how many bytes that took."""

    async def act(stores: Stores) -> int:
        organization_id = await chosen_organization(stores, org)
        chosen = EntryFilter(start_at=first, end_at=last)
        written = 0
        with _sink(output) as file:
            pieces = export(stores.database, chosen, organization_id=organization_id, form=form, view=OPERATORS)
            async for piece in pieces:
                with _told(output):
                    written += file.write(piece)
        return written

    return on_stores(act)


@contextmanager
def _sink(output: Path | None) -> Generator[BinaryIO]:
    """Open where to write. A file gets its name at the end: nobody takes a part for the whole."""
    if output is None:
        yield sys.stdout.buffer
        with _told(output):
            sys.stdout.flush()
        return
    # A pipe or a device keeps its place.
    is_file = output.is_file() or not output.exists()
    partial = output.with_name(f"{output.name}.part") if is_file else output
    with _told(output):
        file = partial.open("wb")
    try:
        yield file
        with _told(output):
            file.close()
            if is_file:
                partial.replace(output)
    finally:
        with suppress(OSError):
            file.close()
        if is_file:
            partial.unlink(missing_ok=True)


@contextmanager
def _told(output: Path | None) -> Generator[None]:
    """End with what went wrong with the file, which must not be taken for a fault of the stores."""
    try:
        yield
    except BrokenPipeError:
        # Whoever read has seen enough. What Python flushes at the end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        fail(f"{output or 'standard output'} cannot be written: {error.strerror}")
