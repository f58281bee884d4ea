"""Waits until descriptors can be read, whatever their numbers: select(2) takes none above 1023."""

import select
from collections.abc import Iterable
from typing import Protocol, TypeVar


class HasFileno(Protocol):
    """A socket, or what else has a descriptor."""

    def fileno(self) -> int: ...


Source = TypeVar("Source", bound=int | HasFileno)


def readable(sources: Iterable[Source], timeout_s: float | None) -> list[Source]:
    """Those of the sources that can be read, or have ended, after at most so many seconds; None is for ever."""
    numbers = {source if isinstance(source, int) else source.fileno(): source for source in sources}
    poll = select.poll()
    for number in numbers:
        poll.register(number, select.POLLIN)
    return [numbers[number] for number, _ in poll.poll(None if timeout_s is None else max(0.0, timeout_s) * 1000)]
