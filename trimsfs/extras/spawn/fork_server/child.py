"""Makes a fork what its caller asked for: descriptors, directory, limits, signals, environment, and its name in ps."""

import ctypes
import fcntl
import io
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from trimsfs.extras.spawn.fork_server.random_state import renew

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME = 1, 4, 15
_ARGUMENTS_START, _ARGUMENTS_END = 47, 48
"""Where /proc/self/stat, split at spaces, has the addresses of the command line."""
_SHOWN_COMMAND = 15


def be_traceable(*, may: bool) -> None:
    """Whether others with this process's identity may trace it: not before it is what its caller is."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(may), 0, 0, 0)


def end_with_parent(channel: socket.socket) -> None:
    """Have the kernel kill this process when the fork server ends. Raises EOFError if it has ended: *channel* tells.

    A change of the user, or of the parent, would undo that.
    """
    be_killed_with_parent()
    with suppress(BlockingIOError):
        if not channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
            raise EOFError


def be_killed_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def become(
    order: dict[str, Any],
    descriptors: Sequence[int],
    *,
    first: int,
    changes: dict[str, str | None],
    keep: int,
    joins: bool,
) -> None:
    """Take over all that *order* says of the caller. Raises OSError and ValueError.

    *descriptors* are the caller's working directory and then its descriptors, whose numbers are in the order. This
    process uses numbers from *first* up for others meanwhile, and *keep* for its channel to the server. *changes* are
    what imports did to the environment. One that *joins* its caller may be another user's than the server.
    """
    if joins:
        os.setsid()  # the fork server's session is not the caller's, nor is its terminal
    else:
        os.setpgid(0, 0)  # so that a terminal's signals reach what the program starts, too
    os.fchdir(descriptors[0])
    os.umask(order["umask"])
    _place(order["descriptors"], descriptors, max([first, *(number + 1 for number in order["descriptors"])]))
    for limit, soft, hard in order["limits"]:
        if resource.getrlimit(limit) != (soft, hard):
            resource.setrlimit(limit, (soft, hard))
    os.sched_setaffinity(0, order["affinity"])
    _set_environment(order["environment"], changes)
    set_title(order["line"])
    renew()
    _open_standard_streams()
    os.set_inheritable(keep, False)


def take_signals(order: dict[str, Any]) -> None:
    """Ignore and block the signals that the caller ignores and blocks. Those that arrived meanwhile take effect now."""
    for number in order["ignored"]:
        if number not in {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, order["blocked"])


def _place(numbers: Sequence[int], descriptors: Sequence[int], first: int) -> None:
    """Give the caller's descriptors the numbers that they have there."""
    moved = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, first) for each in descriptors[1:]]
    for each in descriptors:
        os.close(each)
    for number, each in zip(numbers, moved, strict=True):
        os.dup2(each, number)
        os.close(each)
    for number in {0, 1, 2} - set(numbers):
        os.close(number)


def _set_environment(environment: dict[str, str], changes: dict[str, str | None]) -> None:
    wanted = dict(environment)
    for name, value in changes.items():
        if value is None:
            wanted.pop(name, None)
        else:
            wanted[name] = value
    if list(os.environ.items()) != list(wanted.items()):  # their order, too
        os.environ.clear()
        os.environ.update(wanted)


def _open_standard_streams() -> None:
    """Make `sys.stdin` and the others anew, as Python does at its start, but the same objects: modules have them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, f"__{name}__")
        if stream is None:
            continue
        try:
            os.fstat(number)
        except OSError:
            setattr(sys, name, None)
            setattr(sys, f"__{name}__", None)
            continue
        unbuffered = stream.write_through
        raw = io.FileIO(number, "wb" if number else "rb", closefd=False)
        raw.name = f"<{name}>"
        buffer: Any = raw
        if number == 0 or not unbuffered:
            buffer = io.BufferedWriter(raw) if number else io.BufferedReader(raw)
        encoding, errors = stream.encoding, stream.errors
        stream.detach()
        stream.__init__(
            buffer,
            encoding=encoding,
            errors=errors,
            newline="\n" if number else None,
            line_buffering=not unbuffered and (number == 2 or raw.isatty()),
            write_through=unbuffered,
        )


def set_title(line: Iterable[str]) -> None:
    """Have ps show *line* as this process's command line, cut to the room that the server's own had."""
    words = list(line)
    start, end = _arguments()
    text = b"".join(os.fsencode(word) + b"\0" for word in words)[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))
    name = os.fsencode(os.path.basename(words[0]))[:_SHOWN_COMMAND]
    ctypes.CDLL(None).prctl(_PR_SET_NAME, ctypes.c_char_p(name), 0, 0, 0)


@cache
def _arguments() -> tuple[int, int]:
    """Where the command line lies in memory. Read once: forks may have another /proc, or none."""
    with open("/proc/self/stat", errors="replace") as file:
        fields = file.read().rpartition(")")[2].split()
    return int(fields[_ARGUMENTS_START - 2]), int(fields[_ARGUMENTS_END - 2])
