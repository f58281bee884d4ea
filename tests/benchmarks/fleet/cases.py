"""What is measured of a fleet, each case over empty caches; a result has a bound where one is promised."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from tests.benchmarks.children import Child, begin
from tests.benchmarks.fleet.setting import OBJECT, SMALL, Round, Setting
from tests.fleet.members import Member

GB = 10**9
SLOW = 10
"""By what the rate of a slow uplink is divided."""
MIDWAY = 0.5
"""When a host is lost: this share of the least time after the begin."""
ANNOUNCED_S = 8
"""Until all members have read a new list."""
OPENS_S = 5
OUTCOME_S = 30
LATE = 2
"""Hosts that come when the others have the object."""


@dataclass(frozen=True, slots=True)
class Result:
    """A number, and the most that it may be."""

    case: str
    name: str
    value: float
    bound: float | None = None

    @property
    def verdict(self) -> tuple[str, str]:
        """Its bound, and whether it is met."""
        if self.bound is None:
            return "", ""
        return f"{self.bound:g}", "met" if self.value <= self.bound else "missed"


class References:
    """What cases are compared with, each measured when it is first asked for."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    @cached_property
    def link_s(self) -> float:
        """One plain GET on one host, in seconds: also the least time for all hosts together, as the store's link is
        no faster than a host's."""
        return self.setting.link_s()

    @cached_property
    def one(self) -> tuple[Round, float]:
        """One host that fetches from the store, and its processor time in seconds."""
        with self.setting.fleet(1, alone=True) as fleet:
            fleet.up(fleet.members)
            before = fleet.members[0].cpu_s()
            return self.setting.read(fleet.members), fleet.members[0].cpu_s() - before

    @cached_property
    def all(self) -> Round:
        """All hosts, each of which fetches from the store."""
        with self.setting.everyone(alone=True) as fleet:
            return self.setting.read(fleet.members)


Case = Callable[[References], Iterator[Result]]


def store_alone(to: References) -> Iterator[Result]:
    """No fleet: one host, and all at once."""
    case, (one, cpu_s) = "store alone", to.one
    yield Result(case, "one plain GET, in seconds", to.link_s)
    yield Result(case, "one host, in seconds", one.seconds)
    yield Result(case, "first bytes of one host, in seconds", one.first_s)
    yield Result(case, "processor time of one host, in seconds a GB", cpu_s / to.setting.size * GB)
    yield Result(case, "all hosts, in seconds", to.all.seconds)
    yield Result(case, "all hosts, bytes of the store / object", to.all.store_bytes / to.setting.size)


def together(to: References) -> Iterator[Result]:
    """All hosts at once, none of which has anything."""
    case, setting = "all cold together", to.setting
    with setting.everyone() as fleet:
        read = setting.read(fleet.members)
    yield from _compared(case, to, read, time_bound=1.5, store_bound=1.05)
    yield Result(case, "time / all from the store", read.seconds / to.all.seconds, 0.2)
    yield Result(case, "first bytes, in seconds", read.first_s)
    yield Result(case, "first bytes / one host", read.first_s / to.one[0].first_s, 1.5)


def late(to: References) -> Iterator[Result]:
    """Hosts that come when all others have the object and the store does not answer: one, then another while a host
    that sends opens a file again and again."""
    case, setting = "late host, store down", to.setting
    with setting.fleet(len(setting.hosts)) as fleet:
        early, first = fleet.members[LATE:], fleet.members[LATE]
        fleet.announce(early)
        fleet.up(early)
        setting.read(early)
        fleet.announce(fleet.members)
        fleet.up(fleet.members[:LATE])
        for member in fleet.members:
            os.stat(member.mount.path / OBJECT)
        (first.mount.path / SMALL).read_bytes()
        time.sleep(ANNOUNCED_S)
        setting.store.host.unplug()
        receiving, sending = fleet.members[0].cpu_s(), sum(member.cpu_s() for member in fleet.members[1:])
        read = setting.read([fleet.members[0]])
        receiving = fleet.members[0].cpu_s() - receiving
        sending = sum(member.cpu_s() for member in fleet.members[1:]) - sending
        opens = _opens(first, lambda: setting.read([fleet.members[1]]))
        beside = _opens(first, lambda: time.sleep(OPENS_S))
    yield Result(case, "time, in seconds", read.seconds)
    yield Result(case, "time / one plain GET", read.seconds / to.link_s, 1.15)
    yield Result(case, "processor time to send, in seconds a GB", sending / setting.size * GB, 1.0)
    yield Result(case, "processor time to receive, in seconds a GB", receiving / setting.size * GB)
    yield Result(case, "processor time to receive / from the store", receiving / to.one[1], 1.1)
    yield Result(case, "99 % of opens on a host that sends, in milliseconds", opens * 1000, 5)
    yield Result(case, "99 % of opens on a host at rest, in milliseconds", beside * 1000)


def slow_uplink(to: References) -> Iterator[Result]:
    """One host sends at a tenth of the rate."""
    case, setting = "one slow uplink", to.setting
    with setting.everyone() as fleet:
        fleet.members[0].host.limit(up=setting.rate // SLOW)
        read = setting.read(fleet.members)
    yield from _compared(case, to, read, time_bound=2, store_bound=1.25)


def killed(to: References) -> Iterator[Result]:
    """All processes of one host are killed midway: others' connections to it are refused."""
    yield from _lost("host killed midway", to, lambda member: member.kill())


def black_holed(to: References) -> Iterator[Result]:
    """One host's link loses everything midway: others get no answer at all."""
    yield from _lost("host unreachable midway", to, lambda member: member.host.unplug())


def nobody(to: References) -> Iterator[Result]:
    """One host of a fleet: of no other, and of others none of which is up, half of them unreachable."""
    setting = to.setting
    with setting.fleet(1) as fleet:
        fleet.up(fleet.members)
        read = setting.read(fleet.members)
    yield Result("fleet of one", "time / store alone", read.seconds / to.one[0].seconds, 1.05)
    with setting.fleet(len(setting.hosts)) as fleet:
        fleet.up(fleet.members[:1])
        for member in fleet.members[1::2]:
            member.host.unplug()
        read = setting.read(fleet.members[:1])
    yield Result("all others dead", "time / store alone", read.seconds / to.one[0].seconds, 1.05)


CASES: dict[str, Case] = {
    "store": store_alone,
    "together": together,
    "late": late,
    "slow": slow_uplink,
    "killed": killed,
    "unreachable": black_holed,
    "nobody": nobody,
}


def _lost(case: str, to: References, lose: Callable[[Member], object]) -> Iterator[Result]:
    setting = to.setting
    with setting.everyone() as fleet, ExitStack() as stack:
        lost, *others = fleet.members
        # It fetches as the others do; its own program's bytes do not matter.
        victim = stack.enter_context(setting.reader(lost))

        def midway() -> None:
            victim.tell()
            time.sleep(to.link_s * MIDWAY)
            lose(lost)

        read = setting.read(others, midway)
    yield from _compared(case, to, read, time_bound=2.5)


def _compared(
    case: str, to: References, read: Round, *, time_bound: float, store_bound: float | None = None
) -> Iterator[Result]:
    yield Result(case, "time, in seconds", read.seconds)
    yield Result(case, "time / one plain GET", read.seconds / to.link_s, time_bound)
    yield Result(case, "bytes of the store / object", read.store_bytes / to.setting.size, store_bound)


def _opens(member: Member, meanwhile: Callable[[], object]) -> float:
    """The 99th percentile of opens on a member, in seconds."""
    with Child("reader", "opens_until_told", member.mount.path / SMALL, sleep_s=0.005) as child:
        begin([child])
        meanwhile()
        child.tell()
        return float(child.outcome(OUTCOME_S)["p99"])
