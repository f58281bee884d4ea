"""A fleet in virtual time: all hosts want one object at once. Its placement is the real one, its links are not.

A link carries a chunk in one unit of time each way, one after the other; so does the store's. A host wants a few
chunks at once, in the order of the file. It sends a chunk to a few others at once, then names one that has got it.
"""

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial

from trimsfs.extras.fleet.fleet_source import OWNERS
from trimsfs.extras.fleet.placement import Placement, seed_of
from trimsfs.extras.fleet.serving.uploads import MOST_OF_CHUNK, REFERRALS

WINDOW = 8
"""Chunks that a host wants at once."""


@dataclass(slots=True)
class _Copy:
    """A chunk on a host: who waits for it there, to how many it is being sent, and who has got it and can be named."""

    asked: bool = False
    here: bool = False
    active: int = 0
    waiting: deque[int] = field(default_factory=deque)
    holders: deque[int] = field(default_factory=deque)


class Simulation:
    """Runs when made. Afterwards ``ends`` tells when each host had all, and ``sent`` how many chunks it has sent."""

    def __init__(
        self, hosts: int, chunks: int, *, content: str, owners: int = OWNERS, most: int = MOST_OF_CHUNK
    ) -> None:
        names = [f"10.0.{number // 256}.{number % 256}:7443" for number in range(hosts)]
        placement, seed = Placement(names), seed_of(content)
        numbers = {name: number for number, name in enumerate(names)}
        self._owners: Callable[[int], Sequence[int]] = cache(
            lambda chunk: [numbers[name] for name in placement.ranked(seed, chunk, owners)]
        )
        self._chunks, self._most = chunks, most
        self._up, self._down, self._store = [0.0] * hosts, [0.0] * hosts, 0.0
        self._next, self._wanted = [0] * hosts, [0] * hosts
        self._outstanding: defaultdict[tuple[int, int], int] = defaultdict(int)
        self._copies: defaultdict[tuple[int, int], _Copy] = defaultdict(_Copy)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._now = 0.0
        self.store_chunks, self.sent, self.ends = 0, [0] * hosts, [0.0] * hosts
        for host in range(hosts):
            self._want(host)
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            event()

    def _want(self, host: int) -> None:
        """Have the program on a host want as many chunks as it may."""
        while self._wanted[host] < WINDOW and self._next[host] < self._chunks:
            chunk = self._next[host]
            self._next[host] += 1
            if not self._copies[host, chunk].here:
                self._wanted[host] += 1
                self._fetch(host, chunk)

    def _fetch(self, host: int, chunk: int) -> None:
        """Fetch a chunk once: its first owner from the store, others from the owner that they wait less for."""
        copy = self._copies[host, chunk]
        if copy.asked:
            return
        copy.asked = True
        owners = self._owners(chunk)
        above = owners[: owners.index(host)] if host in owners else owners
        if above:
            self._ask(min(above, key=lambda each: self._outstanding[host, each]), host, chunk)
        else:
            self.store_chunks += 1
            self._store = max(self._now, self._store) + 1
            self._receive(host, chunk, self._store - 1)

    def _ask(self, owner: int, host: int, chunk: int) -> None:
        self._outstanding[host, owner] += 1
        self._copies[owner, chunk].waiting.append(host)
        self._fetch(owner, chunk)
        self._send(owner, chunk)

    def _send(self, owner: int, chunk: int) -> None:
        """Send a chunk to those that wait for it, or name them others that have it."""
        copy = self._copies[owner, chunk]
        while copy.here and copy.waiting and copy.active < self._most:
            host = copy.waiting.popleft()
            copy.active += 1
            self.sent[owner] += 1
            self._up[owner] = max(self._now, self._up[owner]) + 1
            self._receive(host, chunk, self._up[owner] - 1, partial(self._sent, owner, host, chunk))
        while copy.waiting and copy.holders and copy.active >= self._most:
            host = copy.waiting.popleft()
            self._outstanding[host, owner] -= 1
            self._ask(copy.holders.popleft(), host, chunk)

    def _sent(self, owner: int, host: int, chunk: int) -> None:
        copy = self._copies[owner, chunk]
        copy.active -= 1
        copy.holders.extend([host] * REFERRALS)
        self._outstanding[host, owner] -= 1
        self._send(owner, chunk)

    def _receive(self, host: int, chunk: int, begins: float, ended: Callable[[], None] = lambda: None) -> None:
        """Have a host receive a chunk that is sent from a time on."""
        self._down[host] = max(begins, self._down[host]) + 1

        def came() -> None:
            copy = self._copies[host, chunk]
            copy.here = True
            ended()
            self._send(host, chunk)
            if chunk < self._next[host]:
                self._wanted[host] -= 1
                self.ends[host] = self._now
                self._want(host)

        heapq.heappush(self._events, (self._down[host], next(self._order), came))
