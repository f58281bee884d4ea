"""Reports the outcome of the mount to the command that waits for it, and writes the keeper's log."""

import contextlib
import json
import os
import select
import sys
from pathlib import Path
from typing import Any

from mountctl.linux import logfile


class Reporter:
    """Reports for a keeper. *status* is the descriptor on which a command waits for the outcome, None without one.

    *log_file* is the file that standard error is written to, None for a terminal.
    """

    def __init__(self, status: int | None, log_file: Path | None) -> None:
        self._status = status
        self._log_file = log_file
        self._reported = False

    def outcome(self, message: dict[str, Any], text: str) -> None:
        """Report the outcome of the mount, once; log *text* if no command waits."""
        if self._reported:
            return
        self._reported = True
        if self._status is None:
            self.log(text)
            return
        with contextlib.suppress(OSError):  # the command has ended
            os.write(self._status, json.dumps(message).encode() + b"\n")
        os.close(self._status)

    def log(self, text: str) -> None:
        """Log a line, or drop it: a log that cannot be written, or whose reader is stuck, must not block the mount."""
        with contextlib.suppress(OSError, ValueError):
            if select.select([], [sys.stderr], [], 0)[1]:
                os.write(sys.stderr.fileno(), f"trimsfs: {text}\n".encode(errors="backslashreplace"))

    def rotate_log(self) -> None:
        """Rotate the log if it is long."""
        if self._log_file is not None:
            logfile.rotate(sys.stderr.fileno(), self._log_file)
