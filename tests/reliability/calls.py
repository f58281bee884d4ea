"""What calls of a program on a read-only file system come to: the same program is run on a mount and on the directory
that it shows, and what differs is compared with a list of what may."""

import errno
import faulthandler
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

FILE, BIG, EMPTY, DIRECTORY, MISSING = "dir/file", "dir/big", "empty", "dir", "dir/missing"
SIZES = {FILE: 10_000, BIG: 3 * (1 << 20) + 123, EMPTY: 0}
"""Bytes of the files that programs look at."""


@dataclass(frozen=True, slots=True)
class Root:
    """Where a program runs; ``scratch`` is a directory on another file system that it may write to."""

    path: str
    scratch: str

    def __truediv__(self, name: str) -> str:
        return f"{self.path}/{name}"

    @contextmanager
    def opened(self, name: str = FILE, flags: int = os.O_RDONLY) -> Iterator[int]:
        descriptor = os.open(self / name, flags)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


Case = Callable[[Root], object]
CASES: dict[str, Case] = {}


def cases(prefix: str, **several: Case) -> None:
    """Cases that are one expression each."""
    CASES.update({f"{prefix}: {name.replace('_', ' ')}": function for name, function in several.items()})


def outcome(function: Callable[[], object]) -> str:
    """What comes of a call, in a word: an errno or a value."""
    try:
        value = function()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except (ValueError, OverflowError) as error:
        return type(error).__name__
    return repr(value)


def outcomes(function: Callable[[Any], object], values: Iterable[Any]) -> list[str]:
    """What comes of a call with each of several values."""
    return [outcome(partial(function, value)) for value in values]


def outcomes_of_all(root: Root) -> dict[str, str]:
    """What all cases come to, each in a process of its own."""
    return {name: in_a_child(partial(outcome, partial(function, root))) for name, function in CASES.items()}


def in_a_child(function: Callable[[], str]) -> str:
    """What a function gives in a child; the signal that has ended it."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            signal.alarm(20)
            os.write(sender, function().encode()[:60_000])
            status = 0
        except BaseException:
            os.write(sender, traceback.format_exc().encode()[-2000:])
        finally:
            os._exit(status)
    os.close(sender)
    with os.fdopen(receiver, "rb") as file:
        text = file.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return text if code >= 0 else signal.Signals(-code).name
