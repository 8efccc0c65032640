"""Writes log lines from a thread of its own: whoever reads our standard error may stop reading, and calls go on."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import Final

_PENDING_BYTES_MAX: Final = 8 * 1024 * 1024
_CLOSE_SECONDS_MAX: Final = 1.0


class LogWriter:
    """A bounded queue in front of a file descriptor. When it is full, lines are dropped and counted."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._pending: deque[bytes] = deque()
        self._pending_bytes = 0
        self._wake = threading.Condition()
        self.dropped = 0
        # A daemon: a write that never returns must not keep the process from ending.
        threading.Thread(target=self._write_forever, name="log-writer", daemon=True).start()

    def write(self, text: str | bytes) -> None:
        """Queue *text*; never waits for whoever reads it."""
        data = text.encode("utf-8", "backslashreplace") if isinstance(text, str) else text
        with self._wake:
            if self._pending_bytes + len(data) > _PENDING_BYTES_MAX:
                self.dropped += 1
                return
            self._pending.append(data)
            self._pending_bytes += len(data)
            self._wake.notify()

    def flush(self) -> None:
        """Do nothing: what streams have is asked of this too."""

    def close(self) -> None:
        """Wait a moment for what is queued to be written."""
        deadline = time.monotonic() + _CLOSE_SECONDS_MAX
        with self._wake:
            while self._pending_bytes and time.monotonic() < deadline:
                self._wake.wait(0.05)

    def _write_forever(self) -> None:
        while True:
            with self._wake:
                while not self._pending:
                    self._wake.wait()
                data = b"".join(self._pending)
                self._pending.clear()
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                self.dropped += 1
            with self._wake:
                self._pending_bytes = sum(map(len, self._pending))
                self._wake.notify_all()
