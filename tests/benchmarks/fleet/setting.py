"""The hosts, the store and the object that all cases use, and how programs on the hosts read it together."""

import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.children import Child
from tests.benchmarks.data import content
from tests.benchmarks.scale import MIB
from tests.fleet.members import Fleet, Member, a_fleet
from tests.fleet.stores import BUCKET, FleetStore, a_real_store
from tests.support.network import Host, a_network

OBJECT, SMALL = "model.safetensors", "config.json"
_PIECE = 8 * MIB


@dataclass(frozen=True, slots=True)
class Round:
    """What programs saw that read the object together."""

    seconds: float
    """Until the last of them had it."""
    first_s: float
    """Until the last of them had its first bytes."""
    store_bytes: float
    """What the store sent meanwhile."""
    ahead_s: float = 0.0
    """How much of the time a cache took to fetch the object before anybody asked."""


@dataclass(slots=True)
class Setting:
    """A store with the object, and hosts with links of one rate, in bytes a second; so is the store's."""

    directory: Path
    logs: Path
    """Where the logs of servers and of nginx are kept."""
    size: int
    rate: int
    timeout_s: float
    store: FleetStore
    hosts: Sequence[Host]
    cache: Host
    """Where a cache of the hosts runs, in the cases that have one."""
    _fleets: int = 0
    wrong: list[str] = field(default_factory=list)
    """Readers that got a wrong byte."""

    @property
    def expected(self) -> Path:
        """The object, as it must be read."""
        return self.directory / "expected" / OBJECT

    @contextmanager
    def fleet(self, count: int, *options: str, alone: bool = False) -> Iterator[Fleet]:
        """A fleet of the first hosts with empty caches, none of it up; then all links are as they were.

        They mount with these *options*.
        """
        self._fleets += 1
        hosts = self.hosts[:count]
        try:
            with a_fleet(self.directory / f"fleet{self._fleets}", self.store, hosts, *options, alone=alone) as fleet:
                yield fleet
        finally:
            kept = self.logs / f"fleet{self._fleets}"
            kept.mkdir(exist_ok=True)
            for log in (self.directory / f"fleet{self._fleets}").rglob("*.log"):
                shutil.copy(log, kept / f"{log.parent.name}-{log.name}")
            for host in (*hosts, self.store.host):
                host.plug()
                host.limit(up=self.rate, down=self.rate)

    @contextmanager
    def everyone(self, *options: str, alone: bool = False) -> Iterator[Fleet]:
        """All hosts as a `fleet`, up."""
        with self.fleet(len(self.hosts), *options, alone=alone) as fleet:
            fleet.up(fleet.members)
            yield fleet

    def link_s(self) -> float:
        """How long one plain GET of the object takes on one host: no host can have it sooner."""
        with closing(self.store.server.client()) as client:
            url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": OBJECT})

        def get() -> float:
            begun = time.monotonic()
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(url, timeout=self.timeout_s) as answer:
                while answer.read(_PIECE):
                    pass
            return time.monotonic() - begun

        return self.hosts[0].namespace.call(get)

    @contextmanager
    def reader(self, member: Member) -> Iterator[Child]:
        """A program on a member that reads the object once it is told."""
        path = member.mount.path / OBJECT
        with Child("fleet.reader", "once", path, expected=self.expected) as child:
            child.wait_ready()
            yield child

    def read(self, members: Sequence[Member], meanwhile: Callable[[], object] = lambda: None) -> Round:
        """Have a program on each of these members read the object, and do something *meanwhile*."""
        before = self.store.sent_bytes()
        with ExitStack() as stack:
            readers = [stack.enter_context(self.reader(member)) for member in members]
            begun = time.monotonic()
            for reader in readers:
                reader.tell()
            meanwhile()
            outcomes = [reader.outcome(self.timeout_s) for reader in readers]
        self.wrong += [member.entry for member, one in zip(members, outcomes, strict=True) if one["wrong"]]
        return Round(
            max(one["ended"] for one in outcomes) - begun,
            max(one["first_s"] for one in outcomes),
            self.store.sent_bytes() - before,
        )


@contextmanager
def a_setting(directory: Path, logs: Path, *, size: int, rate: int, count: int, timeout_s: float) -> Iterator[Setting]:
    """A store with the object and a small one, and *count* hosts; logs are kept in *logs*."""
    expected = directory / "expected"
    expected.mkdir()
    logs.mkdir(parents=True, exist_ok=True)
    with (expected / OBJECT).open("wb") as file:
        for at in range(0, size, _PIECE):
            file.write(content(min(_PIECE, size - at), at))
    with a_network() as network:
        place = network.host(rate)
        with a_real_store(place, public=True) as store:
            store.put({OBJECT: (expected / OBJECT).read_bytes(), SMALL: b"{}"})
            hosts = [network.host(rate) for _ in range(count)]
            yield Setting(directory, logs, size, rate, timeout_s, store, hosts, network.host(rate))
