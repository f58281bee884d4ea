"""What a keeper says: to whoever waits for the mount, once, and to its log."""

import contextlib
import json
import os
import select
import sys
from pathlib import Path
from typing import Any

from mountctl.linux import logfile


class Reporter:
    """Speaks for a keeper. *status* is the descriptor on which the first outcome is waited for, if anybody does;
    *log_file* is what the error output leads to, None for a terminal."""

    def __init__(self, status: int | None, log_file: Path | None) -> None:
        self._status = status
        self._log_file = log_file
        self._told = False

    def tell(self, message: dict[str, Any], text: str) -> None:
        """Tell what has become of the mount, unless that has been told before; *text* is for the log."""
        if self._told:
            return
        self._told = True
        if self._status is None:
            self.log(text)
            return
        with contextlib.suppress(OSError):  # whoever waited is gone
            os.write(self._status, json.dumps(message).encode() + b"\n")
        os.close(self._status)

    def log(self, text: str) -> None:
        """Log a line. Whatever becomes of the log, the mount goes on."""
        with contextlib.suppress(OSError, ValueError):
            if select.select([], [sys.stderr], [], 0)[1]:
                os.write(sys.stderr.fileno(), f"trimsfs: {text}\n".encode(errors="backslashreplace"))

    def shorten_log(self) -> None:
        """Keep the log short."""
        if self._log_file is not None:
            logfile.shorten(sys.stderr.fileno(), self._log_file)
