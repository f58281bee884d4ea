"""Reports the outcome of the mount to the command that waits for it, and writes the keeper's log."""

import contextlib
import json
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

from mountctl.linux import logfile
from trimsfs.text import printable

ROTATION_INTERVAL_S = 60.0
"""How long a keeper that could not rotate its log waits before it tries again."""


class Reporter:
    """Reports for a keeper. *status* is the descriptor on which a command waits for the outcome, None without one.

    *log_file* is the file that standard error is written to, None for a terminal.
    """

    def __init__(self, status: int | None, log_file: Path | None) -> None:
        self._status = status
        self._log_file = log_file
        self._reported = False
        self._rotates_at = 0.0
        """When to rotate the log again after a failure, by the monotonic clock."""

    def outcome(self, message: dict[str, Any], text: str) -> None:
        """Report the outcome of the mount, once; log *text* if no command waits."""
        if self._reported:
            return
        self._reported = True
        if self._status is None:
            self._log("INFO" if message["type"] == "ready" else "ERROR", text)
            return
        with contextlib.suppress(OSError):  # the command has ended
            os.write(self._status, json.dumps(message).encode() + b"\n")
        os.close(self._status)

    def info(self, text: str) -> None:
        """Log what the keeper does."""
        self._log("INFO", text)

    def warning(self, text: str) -> None:
        """Log what the keeper mends by itself."""
        self._log("WARNING", text)

    def error(self, text: str) -> None:
        """Log what ends the mount, a server or the keeper."""
        self._log("ERROR", text)

    def _log(self, level: str, text: str) -> None:
        """Log a line as servers do, with further lines of *text* indented.

        A log that cannot be written, or whose reader is stuck, must not block the mount: the line is dropped.
        """
        now = time.time()
        stamp = f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))},{int(now * 1000) % 1000:03}"
        lines = "\n  ".join(printable(line) for line in text.rstrip().split("\n"))
        with contextlib.suppress(OSError, ValueError):
            if select.select([], [sys.stderr], [], 0)[1]:
                entry = f"{stamp} {level} mountctl.keeper: {lines}".encode(errors="backslashreplace")
                os.write(sys.stderr.fileno(), entry[: select.PIPE_BUF - 1] + b"\n")  # what surely fits into a pipe

    def rotate_log(self) -> None:
        if self._log_file is not None and time.monotonic() >= self._rotates_at:
            try:
                logfile.rotate(sys.stderr.fileno(), self._log_file)
            except OSError:
                self._rotates_at = time.monotonic() + ROTATION_INTERVAL_S
