"""Early heads: while a directory is listed for a name, the first bytes of what may be the object come beside it.

A program that opens a large file in a directory that nobody has listed yet has its first bytes a round trip sooner.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import trio
from cachetools import LRUCache

from trimsfs.concurrency.background import Background
from trimsfs.errors import StoreError
from trimsfs.stores.base import Head, Peekable
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.types import Buffer, Generation

log = logging.getLogger(__name__)

HEAD_BYTES = 128 << 10
"""What comes of a file before its chunks: the kernel's first read asks for no more."""
MOST_HEADS = 32
"""How many are kept in memory."""
MOST_AT_ONCE = 2
"""Listings need the same threads, and others wait for those."""
PATIENCE_S = 0.5
"""How long a reader waits for a head that is on its way, before it asks for one itself."""


@dataclass(slots=True)
class _EarlyHead:
    """A head that has been asked for; ``done`` also if it will not come."""

    head: Head | None = None
    done: trio.Event = field(default_factory=trio.Event)


class EarlyHeads:
    """Asks a store once for the head of each name that leads to a listing, and gives it to a reader of that content."""

    def __init__(self, store: Peekable, breaker: CircuitBreaker) -> None:
        self._store = store
        self._breaker = breaker
        self._background = Background()
        self._under_way = 0
        self._heads: LRUCache[str, _EarlyHead] = LRUCache(MOST_HEADS)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch in the background until the server stops."""
        await self._background.run(task_status)

    def expect(self, key: str) -> None:
        """Start to fetch the head of what may be an object."""
        if not self._background.running or self._under_way >= MOST_AT_ONCE or key in self._heads:
            return
        if self._breaker.failing or self._breaker.refusal is not None:
            return
        early = self._heads[key] = _EarlyHead()
        self._under_way += 1
        self._background.start(partial(self._fill, key, early))

    async def of(self, generation: Generation) -> Buffer | None:
        """The head of a generation, once; None if it was not asked for, is late, or is of another content."""
        early = self._heads.pop(generation.key, None)
        if early is None:
            return None
        with trio.move_on_after(PATIENCE_S):
            await early.done.wait()
        head = early.head
        same = head is not None and (head.etag, head.size) == (generation.etag, generation.size)
        return head.data if head is not None and same else None

    async def _fill(self, key: str, early: _EarlyHead) -> None:
        try:
            with suppress(StoreError):  # it may be a directory, or absent: the listing tells
                early.head = await self._store.peek(key, HEAD_BYTES)
        except Exception:  # a defect: it ends this request, not the server
            log.exception("%s: first bytes not fetched: internal error", key)
        finally:
            self._under_way -= 1
            early.done.set()
            if early.head is None and self._heads.get(key) is early:
                del self._heads[key]
