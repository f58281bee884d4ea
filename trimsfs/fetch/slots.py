"""Slots: how many requests may be under way at once, to the store and to peers."""

from collections.abc import Callable

from trimsfs.concurrency.adaptive_limit import AdaptiveLimit
from trimsfs.fetch.flights import Lane

PEER_REQUESTS, DEMANDED_PEER_REQUESTS = 16, 32
"""Most requests to peers at once, for what is prefetched and for what readers wait for."""
LEAST_SHARE = 1
"""Requests to the store that a host may have under way, however many hosts share them."""


class Slots:
    """Counts the batches under way of each lane. Those of the store stay within its adaptive *limit*; demanded ones
    within its maximum.

    What other hosts wait for has slots of its own in each lane. A host that waits for a peer can then still serve that
    peer, so that no two wait for each other.

    *hosts* tells how many hosts fetch together: they share the requests that one of them would have under way. Their
    chunks then land one after the other, and are passed on meanwhile; all at once, they would land at the end.
    """

    def __init__(self, limit: AdaptiveLimit, hosts: Callable[[], int]) -> None:
        self._limit = limit
        self._hosts = hosts
        self._under_way = [0 for _ in Lane]
        self._for_others = [0 for _ in Lane]

    @property
    def in_use(self) -> int:
        """The number of batches under way."""
        return sum(self._under_way) + sum(self._for_others)

    @property
    def for_demanded(self) -> list[int]:
        """How many demanded batches may start, by lane."""
        return [
            self._limit.maximum - self._in_store,
            DEMANDED_PEER_REQUESTS - self._under_way[Lane.PEERS],
        ]

    @property
    def for_prefetched(self) -> list[int]:
        """How many prefetched batches may start, by lane."""
        return [self._share - self._in_store, PEER_REQUESTS - self._under_way[Lane.PEERS]]

    @property
    def for_others(self) -> list[int]:
        """How many batches may start for other hosts, by lane."""
        return [
            max(self._share - self._in_store, 1 - self._for_others[Lane.STORE]),
            PEER_REQUESTS - self._for_others[Lane.PEERS],
        ]

    @property
    def _share(self) -> int:
        """How many requests to the store this host may have under way, but for what its readers wait for, and for one
        that others wait for."""
        hosts = self._hosts()
        return self._limit.limit if hosts == 1 else max(LEAST_SHARE, self._limit.limit // hosts - 1)

    @property
    def _in_store(self) -> int:
        return self._under_way[Lane.STORE] + self._for_others[Lane.STORE]

    def take(self, lane: Lane, *, for_others: bool) -> None:
        """Count a batch that starts."""
        (self._for_others if for_others else self._under_way)[lane] += 1

    def give_back(self, lane: Lane, *, for_others: bool) -> None:
        """Undo one `take`."""
        (self._for_others if for_others else self._under_way)[lane] -= 1
