"""Text for terminals: names that others have chosen, log lines, and the titles that ``ps`` shows."""

import errno
import logging
from pathlib import Path
from types import TracebackType

from setproctitle import setproctitle

TITLE_PREFIX = "trimsfs "
"""The prefix of the titles of a mount's processes."""

Raised = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def printable(text: str) -> str:
    """Text as one line, with all unprintable characters escaped."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def title(role: str, mountpoint: Path) -> str:
    """The title of a process of a mount."""
    return f"{TITLE_PREFIX}{role} {printable(str(mountpoint))}"


def set_process_title(role: str, mountpoint: Path) -> None:
    """Make ``ps`` show this process as ``trimsfs ROLE MOUNTPOINT``.

    The title overwrites the memory that /proc/PID/cmdline and /proc/PID/environ show; `os.environ` stays as it is.
    """
    setproctitle(title(role, mountpoint))


class LineFormatter(logging.Formatter):
    """Formats each record as one line, and a traceback as indented lines after it.

    So a name that contains line breaks cannot forge log lines.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return printable(super().formatMessage(record))

    def formatException(self, ei: Raised) -> str:  # noqa: N802
        return _indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:  # noqa: N802
        return _indented(super().formatStack(stack_info))


def _indented(text: str) -> str:
    return "\n".join(f"  {printable(line)}" for line in text.split("\n"))


def or_free_space(error: OSError, remedy: str) -> str:
    """What to do about a file that cannot be written: a remedy or, if the disk is full, to make room as well."""
    return f"free some space, or {remedy}" if error.errno in {errno.ENOSPC, errno.EDQUOT} else remedy
