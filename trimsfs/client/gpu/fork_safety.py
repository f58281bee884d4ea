"""Descriptors that a forked child has no use for, as what CUDA has mapped is not in it: it closes them at once.

It would else hold leases on, and memory; the parent loses nothing. Other threads may be opening or closing some when a
process is forked. Steps that do not wait are taken with the `guard`. An open that waits for a copy to be loaded is not,
as it would keep the process from forking for as long; what it has opened just then is found by its path.
"""

import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path

guard = threading.RLock()
"""Nobody forks this process meanwhile. Of a kind that is taken again, as a finalizer may do at any time."""
_DELETED = " (deleted)"
_DESCRIPTORS = "/proc/self/fd"


class Descriptor:
    """An open descriptor of this process, closed in a child. To be made with the `guard`, beside what opens it."""

    def __init__(self, number: int) -> None:
        self._number = number
        _open.add(self)

    @property
    def number(self) -> int:
        """-1 when it is closed."""
        return self._number

    def close(self) -> None:
        """A second call does nothing."""
        with guard:
            number, self._number = self._number, -1
            if number >= 0:
                os.close(number)


def open_file(path: Path) -> Descriptor:
    """Open a file for reading, which may take long. Raises OSError."""
    name = str(path)
    with guard:
        _opening.append(name)
    try:
        return Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        with guard:
            if name in _opening:  # not in a child
                _opening.remove(name)


_open: "weakref.WeakSet[Descriptor]" = weakref.WeakSet()
_opening: list[str] = []


def _let_go() -> None:
    for descriptor in list(_open):
        with suppress(OSError):
            descriptor.close()
    with suppress(OSError):  # without /proc
        for name in os.listdir(_DESCRIPTORS) if _opening else ():
            with suppress(OSError):
                if os.readlink(f"{_DESCRIPTORS}/{name}").removesuffix(_DELETED) in _opening:
                    os.close(int(name))
    _opening.clear()
    guard.release()


os.register_at_fork(before=guard.acquire, after_in_parent=guard.release, after_in_child=_let_go)
