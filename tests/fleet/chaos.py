"""Chaos: one member after the other is killed, frozen, slow, cut off or gone, while programs on all of them read."""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fleet.members import Fleet, Member
from tests.fleet.reading import reading

SLOW = 10
"""By what the rate of a slow uplink is divided."""

Trouble = Callable[["Chaos", Member], object]


@dataclass(slots=True)
class Chaos:
    """The members, and the programs on them, which read the files in *expected*."""

    fleet: Fleet
    expected: Path
    rate: int
    random: random.Random
    lasts_s: float
    """How long a trouble lasts."""
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    """What each of the programs saw that have ended."""
    _readers: dict[str, ExitStack] = field(default_factory=dict)

    def start(self, member: Member) -> None:
        """Have a program read on a member."""
        stack = self._readers[member.entry] = ExitStack()
        end = stack.enter_context(reading(member, self.expected, self.random.randrange(1 << 30)))
        stack.callback(lambda: self.outcomes.append({"member": member.entry, **end()}))

    def end(self, member: Member) -> None:
        """Have it end."""
        self._readers.pop(member.entry).close()

    def last(self) -> None:
        """Wait as long as a trouble lasts."""
        time.sleep(self.lasts_s)


@contextmanager
def _without(chaos: Chaos, member: Member) -> Iterator[None]:
    """No program reads on a member that is about to end; it is up and read from again afterwards."""
    chaos.end(member)
    yield
    chaos.last()
    chaos.fleet.down(member)
    chaos.fleet.announce(chaos.fleet.members)
    chaos.fleet.up([member])
    chaos.start(member)


def killed(chaos: Chaos, member: Member) -> None:
    """All its processes are killed; it comes back with its cache."""
    with _without(chaos, member):
        member.kill()


def gone(chaos: Chaos, member: Member) -> None:
    """It leaves, and joins again."""
    with _without(chaos, member):
        chaos.fleet.announce([other for other in chaos.fleet.members if other is not member])
        chaos.fleet.down(member)


def frozen(chaos: Chaos, member: Member) -> None:
    """Its processes stand still: connections to it are accepted, and nothing answers."""
    member.freeze()
    chaos.last()
    member.thaw()


def slow(chaos: Chaos, member: Member) -> None:
    """It sends at a tenth of its rate."""
    member.host.limit(up=chaos.rate // SLOW)
    chaos.last()
    member.host.limit(up=chaos.rate)


def cut_off(chaos: Chaos, member: Member) -> None:
    """Nothing gets to it or from it."""
    member.host.unplug()
    chaos.last()
    member.host.plug()


TROUBLES: tuple[Trouble, ...] = (killed, frozen, slow, cut_off, gone)


def wreak(chaos: Chaos, troubles: int, every_s: float, before: Callable[[], object] = lambda: None) -> None:
    """Start programs on all members, then have so many troubles, each of another kind than the last; end them.

    Calls *before* at the begin of each.
    """
    with ExitStack() as stack:
        for member in chaos.fleet.members:
            chaos.start(member)
            stack.callback(chaos.end, member)
        for number in range(troubles):
            begun = time.monotonic()
            before()
            TROUBLES[number % len(TROUBLES)](chaos, chaos.random.choice(chaos.fleet.members))
            time.sleep(max(0, every_s - (time.monotonic() - begun)))
