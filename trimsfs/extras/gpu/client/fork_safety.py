"""Closes descriptors of leases and GPU memory in forked children, where CUDA's mappings do not exist.

A child would otherwise keep leases and memory in use. The parent keeps its descriptors. Threads hold the `guard` while
they open or close one, so that no fork happens between the steps. An open that waits for a copy to load cannot hold it:
no thread could fork meanwhile. The child finds that descriptor by its path.
"""

import os
import threading
import weakref
from contextlib import suppress
from pathlib import Path

guard = threading.RLock()
"""While a thread holds it, no other thread can fork. Reentrant: a finalizer may take it at any time."""
_DELETED = " (deleted)"
_DESCRIPTORS = "/proc/self/fd"


class Descriptor:
    """An open descriptor that forked children close. Hold the `guard` from opening the descriptor to creating this."""

    def __init__(self, number: int) -> None:
        self._number = number
        _open.add(self)

    @property
    def number(self) -> int:
        """The descriptor; -1 after `close`."""
        return self._number

    def close(self) -> None:
        """Close the descriptor. A second call does nothing."""
        with guard:
            number, self._number = self._number, -1
            if number >= 0:
                os.close(number)


def open_file(path: Path) -> Descriptor:
    """Open a file for reading, without the `guard`, as the open may take long. Raises OSError."""
    name = str(path)
    with guard:
        _opening.append(name)
    try:
        return Descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    finally:
        with guard:
            if name in _opening:  # a forked child has cleared the list
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
