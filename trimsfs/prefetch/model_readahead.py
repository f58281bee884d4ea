"""Model readahead: prefetches the large files that a program will likely open after the one it has opened."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import trio
from cachetools import LRUCache

from trimsfs.concurrency.background import Background
from trimsfs.errors import TrimsError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.fetch.flights import Urgency
from trimsfs.namespace.tree import Namespace
from trimsfs.origins import ByPath, by_path
from trimsfs.prefetch.account import Account
from trimsfs.prefetch.directory_readahead import Readable
from trimsfs.prefetch.load_history import Want, packed, ranges, unpacked
from trimsfs.prefetch.load_plan import LoadPlanner
from trimsfs.prefetch.load_window import CAUTIOUS_FILES, DESCRIBED_FILES, LoadWindow
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.interfaces import BlobUse, Room
from trimsfs.tiers.index.load_records import LoadRecords
from trimsfs.types import Generation

log = logging.getLogger(__name__)

FILES_AT_ONCE = 2
"""Files of one load in flight at once: enough to keep the store busy from one to the next."""
IDLE_S = 10.0
"""A load with no file open ends after IDLE_S without an open: programs pause to convert what they have read."""
PAUSES = 10
"""After 1/N of IDLE_S, the load so far is recorded: the server may not live until its end."""
MOST_LOADS = 256
"""Most directories whose loads are tracked at once."""


@dataclass(slots=True, eq=False)
class Load:
    """A program's load of the model in a directory.

    ``generations`` has the expected files by key; ``parts`` the ranges of chunks wanted of those not wanted whole.
    ``coming`` has the prefetches under way, ``settled`` the files fetched once, or impossible to fetch. ``used`` has
    the files opened; ``handles`` counts handles and opens under way by the blobs' tokens.
    """

    prefix: str
    readable: Readable
    window: LoadWindow = field(default_factory=LoadWindow)
    generations: dict[str, Generation] = field(default_factory=dict)
    parts: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    coming: dict[str, trio.CancelScope] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    used: dict[str, Want] = field(default_factory=dict)
    handles: Counter[str] = field(default_factory=Counter)
    planning: bool = False
    watched: bool = False
    ended: bool = False
    active: float = field(default_factory=trio.current_time)


class ModelReadahead:
    """Watches opens and closes of large files, and prefetches those that come next, in order.

    With *whole_directories*, the first open in a directory prefetches all its files.
    """

    def __init__(
        self,
        namespace: Namespace,
        blobs: BlobUse,
        room: Room,
        loads: LoadRecords,
        fetcher: Fetcher,
        account: Account,
        breaker: CircuitBreaker | ByPath[CircuitBreaker],
        *,
        whole_directories: bool = False,
    ) -> None:
        self._blobs = blobs
        self._space = room
        self._records = loads
        self._fetcher = fetcher
        self._account = account
        self._breakers = by_path(breaker)
        self._planner = LoadPlanner(namespace, blobs, loads, fetcher)
        self._whole = whole_directories
        self._loads: LRUCache[str, Load] = LRUCache(MOST_LOADS)
        self._background = Background()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Prefetch in the background until the server stops."""
        await self._background.run(task_status)

    def record_open(self, blob: Blob, readable: Readable, *, small: bool) -> None:
        """Record an open by a user who may read the *readable* files; a *small* file describes large ones."""
        if not self._background.running:
            return
        key = blob.generation.key
        prefix = key[: key.rfind("/") + 1]
        load = self._loads.get(prefix)
        if small and load is None and blob.complete:
            return
        if load is None or load.ended or (not blob.complete and trio.current_time() - load.active > IDLE_S):
            load = self._begin(prefix, readable, load)
        load.active = trio.current_time()
        if not small:
            load.window.record_open(key)
            load.used.setdefault(key, Want(key[len(prefix) :]))
        elif not load.generations:
            load.window.files = DESCRIBED_FILES
        if not (blob.complete or load.planning or key in load.generations or (small and load.generations)):
            load.planning = True
            self._background.start(self._plan, load, key)
        elif load.generations:
            self._advance(load)
        self._watch(load)

    def _begin(self, prefix: str, readable: Readable, before: Load | None) -> Load:
        """Begin a load. Files of the directory's earlier load may still be open."""
        readable(prefix)  # now: the opening process may have ended once the plan is made
        load = Load(prefix, readable)
        load.window.fixed = self._whole
        if before is not None:
            load.handles = before.handles
            if before.ended:  # its program may only glance at the other files, too
                load.window.files = CAUTIOUS_FILES
            self._end(before)
        elif len(self._loads) == MOST_LOADS:
            self._end(self._loads.popitem()[1])  # the least recently used one
        self._loads[prefix] = load
        return load

    def open_begun(self, blob: Blob) -> None:
        """Count an open of a file from its beginning: while it waits for the file, its program is not idle."""
        load = self._load_of(blob)
        if load is not None:
            load.handles[blob.token] += 1

    def opened(self, blob: Blob) -> None:
        """Record that an open has succeeded, however long it has waited."""
        load = self._load_of(blob)
        if load is not None:
            load.active = trio.current_time()

    def open_failed(self, blob: Blob) -> None:
        """Uncount an open that failed; its program, or the kernel, may try again."""
        load = self._uncount(blob)
        if load is not None:
            self._watch(load)

    def closed(self, blob: Blob) -> None:
        """Uncount a released handle."""
        load = self._uncount(blob)
        if load is None:
            return
        if blob.token not in load.handles:
            self._record_use(load, blob)
        if load.handles or self._whole:
            return
        if blob.complete and load.window.ends_with(blob.generation.key):
            self._close(load)  # the next open begins another load
            return
        if not blob.complete:  # the program did not read it to the end, so it may not want the rest
            self._stop(load)
        self._watch(load)

    def _uncount(self, blob: Blob) -> Load | None:
        """The load of a file, which has one handle or open less; None if it had none."""
        load = self._load_of(blob)
        if load is None or not load.handles[blob.token]:
            return None
        load.handles[blob.token] -= 1
        if not load.handles[blob.token]:
            del load.handles[blob.token]
        load.active = trio.current_time()
        return load

    def _load_of(self, blob: Blob) -> Load | None:
        key = blob.generation.key
        return self._loads.get(key[: key.rfind("/") + 1])

    def _record_use(self, load: Load, blob: Blob) -> None:
        """Record which chunks of a file were used: all if it is whole, else those fetched."""
        key = blob.generation.key
        want = load.used.get(key)
        if want is None or (blob.complete and want.parts is None):
            return
        chunks = [chunk for chunk, state in enumerate(blob.states) if state != ChunkState.MISSING]
        load.used[key] = Want(want.name, None if blob.complete else ranges(chunks))

    # Prefetching the next files

    async def _plan(self, load: Load, key: str) -> None:
        try:
            expected = await (self._planner.directory(load.prefix) if self._whole else self._planner.expected(key))
        except TrimsError as error:
            log.debug("/%s: not prefetched: %s", load.prefix, error)
            return
        except Exception:  # a defect: it ends this plan, not the server
            log.exception("/%s: not prefetched: internal error", load.prefix)
            return
        finally:
            load.planning = False
        load.generations.clear()
        for want, generation in expected:
            if load.readable(generation.key):
                load.generations[generation.key] = generation
                if want.parts is not None:
                    load.parts[generation.key] = want.parts
        load.window.order = list(load.generations)
        if self._whole:
            load.window.files = len(load.generations)
        self._advance(load)

    def _advance(self, load: Load) -> None:
        """Cancel prefetches that are no longer expected, and start the next one that is, unless the server stops."""
        if not self._background.running:
            return
        awaited = load.window.awaited()
        for key, scope in list(load.coming.items()):
            if key not in awaited and key not in load.window.opened:
                scope.cancel()
        room = self._room(load, awaited)
        for key in awaited:
            generation = load.generations[key]
            room -= generation.size
            if room < 0 or load.ended or len(load.coming) >= FILES_AT_ONCE:
                return
            if key not in load.coming and key not in load.settled and not self._is_here(generation):
                load.coming[key] = trio.CancelScope()
                self._background.start(self._bring, load, generation)
                return

    def _room(self, load: Load, awaited: Sequence[str]) -> int:
        """Bytes that all awaited files may have together; those that are here need no free space."""
        if not awaited:
            return 0
        here = sum(load.generations[key].size for key in awaited if self._is_here(load.generations[key]))
        return self._space.room_ahead(load.generations[awaited[0]], here)

    def _is_here(self, generation: Generation) -> bool:
        blob = self._blobs.known(self._blobs.token(generation))
        return blob is not None and blob.complete

    async def _bring(self, load: Load, generation: Generation) -> None:
        key, scope = generation.key, load.coming[generation.key]
        try:
            with scope:
                async with self._blobs.using(generation) as blob:
                    self._advance(load)  # start the next only now, so that they are fetched in order
                    bring = partial(self._bring_blob, blob, load.parts.get(key))
                    with self._account.coming(blob):  # after an outage, retry while the program still loads
                        await self._breakers.of(key).outlast(bring, wanted=lambda: bool(load.handles))
        except TrimsError as error:
            log.debug("%s: not prefetched: %s", key, error)
        finally:
            del load.coming[key]
        if scope.cancelled_caught:
            self._account.gone(self._blobs.token(generation))
        else:
            load.settled.add(key)  # not again: a file evicted before its open does not fit
        if not load.ended:
            self._advance(load)

    async def _bring_blob(self, blob: Blob, parts: tuple[tuple[int, int], ...] | None) -> None:
        if parts is None:
            await self._fetcher.fetch_all(blob, Urgency.AHEAD)
            return
        for first, stop in parts:
            for chunk in range(first, min(stop, len(blob.states))):
                start, _ = blob.span_of(chunk)  # one at a time: reads have no urgency AHEAD
                await self._fetcher.read(blob, start, start + 1)

    # The end of a load

    def _watch(self, load: Load) -> None:
        if not load.watched and self._background.running:
            load.watched = True
            self._background.start(self._end_when_idle, load)

    async def _end_when_idle(self, load: Load) -> None:
        recorded = 0.0
        while self._loads.get(load.prefix) is load:
            idle = trio.current_time() - load.active
            if idle >= IDLE_S and not (self._whole and load.coming):
                break
            if idle >= IDLE_S / PAUSES and recorded < load.active:
                recorded = trio.current_time()
                await self._record(load, paused=True)
            await trio.sleep(IDLE_S / PAUSES)
        load.watched = False
        if self._loads.get(load.prefix) is not load:
            return
        if load.handles:
            await self._record(load)
        else:
            self._close(load)

    def _close(self, load: Load) -> None:
        """Forget a load and end it."""
        del self._loads[load.prefix]
        self._end(load)

    def _stop(self, load: Load) -> None:
        """Cancel the prefetches of a load and start no more."""
        load.ended = True
        for scope in load.coming.values():
            scope.cancel()

    def _end(self, load: Load) -> None:
        """Stop a load, and record what it read for the next one."""
        self._stop(load)
        if load.used and self._background.running:
            self._background.start(self._record, load)

    async def _record(self, load: Load, *, paused: bool = False) -> None:
        """Record what a load read: several files, or one if nothing is recorded yet.

        A *paused* load is not recorded while a file is being read: the rest may follow.
        """
        for token in load.handles:
            blob = self._blobs.known(token)
            if blob is not None:
                if paused and not blob.complete:
                    return
                self._record_use(load, blob)
        record, known = packed(load.used.values()), await self._records.last(load.prefix)
        if record == known or not load.used or (len(load.used) < 2 and (paused or known is not None)):
            return
        if not self._is_part(load, unpacked(known or ""), paused=paused):
            await self._records.record(load.prefix, record)

    def _is_part(self, load: Load, last: Sequence[Want], *, paused: bool) -> bool:
        """Whether a load may be a part of the *last* one: paused before its end, or begun under another server."""
        names, known = [want.name for want in load.used.values()], [want.name for want in last]
        return set(names) <= set(known) and (paused or names[0] != known[0])
