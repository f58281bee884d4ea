"""Prefetches the rest of a model: the large files that a program is likely to open after the one that it opens."""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio
from cachetools import LRUCache

from trimsfs.concurrency.background import Background
from trimsfs.errors import TrimsError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.namespace.tree import Namespace
from trimsfs.prefetch.account import Account
from trimsfs.prefetch.directory_readahead import Readable
from trimsfs.prefetch.load_history import Want, packed, ranges, unpacked
from trimsfs.prefetch.load_plan import LoadPlanner
from trimsfs.prefetch.load_window import CAUTIOUS_FILES, DESCRIBED_FILES, LoadWindow
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Generation

log = logging.getLogger(__name__)

FILES_AT_ONCE = 2
"""Files of one load that come at once: enough to keep the store busy from one to the next."""
IDLE_S = 10.0
"""A load of which nothing is open ends after so long without an open: programs convert what they have read."""
PAUSES = 10
"""A tenth of that is a pause, in which a load is recorded so far: its server may not live to see its end."""
MOST_LOADS = 256
"""Directories that are being loaded at once."""


@dataclass(slots=True, eq=False)
class Load:
    """A program loads the model in a directory.

    ``generations`` are the files that are expected, by key; ``parts`` the only ranges of their chunks that are wanted.
    ``coming`` has those under way, ``settled`` those that came once, or cannot. ``used`` is what was opened,
    ``handles`` counts what is open by the blobs' tokens.
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
    """Watches which large files are opened and closed, and fetches those that come next, whole and in order.

    With *whole_directories*, the first open in a directory brings all its files.
    """

    def __init__(
        self,
        namespace: Namespace,
        disk: DiskTier,
        fetcher: Fetcher,
        account: Account,
        breaker: CircuitBreaker,
        *,
        whole_directories: bool = False,
    ) -> None:
        self._disk = disk
        self._fetcher = fetcher
        self._account = account
        self._breaker = breaker
        self._planner = LoadPlanner(namespace, disk, fetcher)
        self._whole = whole_directories
        self._loads: LRUCache[str, Load] = _Loads(MOST_LOADS, self._end)
        self._background = Background()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Prefetch in the background, for as long as the server runs."""
        await self._background.run(task_status)

    def record_open(self, blob: Blob, readable: Readable, *, small: bool) -> None:
        """A file is opened by somebody who may read what is *readable*; a *small* one tells of the large ones."""
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
        """A load begins; what an earlier one of the directory has opened may be open still."""
        readable(prefix)  # whoever opens may have ended once it is known what comes next
        load = Load(prefix, readable)
        if before is not None:
            load.handles = before.handles
            if before.ended:  # whoever looked at a file may only look at others
                load.window.files = CAUTIOUS_FILES
            self._end(before)
        load.window.fixed = self._whole
        self._loads[prefix] = load
        return load

    def opened(self, blob: Blob) -> None:
        """A program has got a handle of a file."""
        load = self._load_of(blob)
        if load is not None:
            load.handles[blob.token] += 1

    def closed(self, blob: Blob) -> None:
        """A handle of a file is given back."""
        load = self._load_of(blob)
        if load is None or not load.handles[blob.token]:
            return
        load.handles[blob.token] -= 1
        if not load.handles[blob.token]:
            del load.handles[blob.token]
            self._record_use(load, blob)
        load.active = trio.current_time()
        if load.handles or self._whole:
            return
        if blob.complete and load.window.ends_with(blob.generation.key):
            self._close(load)  # whoever opens a file of it now loads it once more
            return
        if not blob.complete:  # it was not read to its end: it is not a load of all
            self._stop(load)
        self._watch(load)

    def _load_of(self, blob: Blob) -> Load | None:
        key = blob.generation.key
        return self._loads.get(key[: key.rfind("/") + 1])

    def _record_use(self, load: Load, blob: Blob) -> None:
        """What was used of a file: all, if all is here, else what was fetched."""
        key = blob.generation.key
        want = load.used.get(key)
        if want is None or (blob.complete and want.parts is None):
            return
        chunks = [chunk for chunk, state in enumerate(blob.states) if state != ChunkState.MISSING]
        load.used[key] = Want(want.name, None if blob.complete else ranges(chunks))

    # What comes next

    async def _plan(self, load: Load, key: str) -> None:
        try:
            expected = await (self._planner.directory(load.prefix) if self._whole else self._planner.expected(key))
        except TrimsError as error:
            log.debug("/%s: not prefetched: %s", load.prefix, error)
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
        """Stop what is not expected any more, and start the next file that is."""
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
        """The bytes that all awaited files may have together: those that are here take none of what is free."""
        if not awaited:
            return 0
        here = sum(load.generations[key].size for key in awaited if self._is_here(load.generations[key]))
        return self._disk.room_ahead(load.generations[awaited[0]], here)

    def _is_here(self, generation: Generation) -> bool:
        blob = self._disk.known(generation.token(self._disk.store))
        return blob is not None and blob.complete

    async def _bring(self, load: Load, generation: Generation) -> None:
        key, scope = generation.key, load.coming[generation.key]
        try:
            with scope:
                async with self._disk.using(generation) as blob:
                    self._advance(load)  # the next one asks after this one, so that they come in order
                    bring = partial(self._bring_blob, blob, load.parts.get(key))
                    with self._account.coming(blob):  # what an outage ends goes on after it for whoever still loads
                        await self._breaker.outlast(bring, wanted=lambda: bool(load.handles))
        except TrimsError as error:
            log.debug("%s: not prefetched: %s", key, error)
        finally:
            del load.coming[key]
        if scope.cancelled_caught:
            self._account.gone(generation.token(self._disk.store))
        else:
            load.settled.add(key)  # what is evicted before it is opened does not fit
        if self._background.running and not load.ended:
            self._advance(load)

    async def _bring_blob(self, blob: Blob, parts: tuple[tuple[int, int], ...] | None) -> None:
        if parts is None:
            await self._fetcher.fetch_all(blob, ahead=True)
            return
        for first, stop in parts:
            for chunk in range(first, min(stop, len(blob.states))):
                start, _ = blob.span_of(chunk)  # one at a time: there is no such read that comes last of all
                await self._fetcher.read(blob, start, start + 1)

    # The end of a load

    def _watch(self, load: Load) -> None:
        if not load.watched:
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
        """Forget a load under way, and end it."""
        del self._loads[load.prefix]
        self._end(load)

    def _stop(self, load: Load) -> None:
        """Nothing more comes ahead."""
        load.ended = True
        for scope in load.coming.values():
            scope.cancel()

    def _end(self, load: Load) -> None:
        """Record what was read for the next load: more than one file, or the first that is known of."""
        self._stop(load)
        if load.used and self._background.running:
            self._background.start(self._record, load)

    async def _record(self, load: Load, *, paused: bool = False) -> None:
        """Record what was read; of one that has only *paused*, nothing while it reads a file: the rest may follow."""
        for token in load.handles:
            blob = self._disk.known(token)
            if blob is not None:
                if paused and not blob.complete:
                    return
                self._record_use(load, blob)
        record, known = packed(load.used.values()), await self._disk.loads.last(load.prefix)
        if record == known or not load.used or (len(load.used) < 2 and (paused or known is not None)):
            return
        if not self._is_part(load, unpacked(known or ""), paused=paused):
            await self._disk.loads.record(load.prefix, record)

    def _is_part(self, load: Load, last: Sequence[Want], *, paused: bool) -> bool:
        """Whether it may read, or may have read before this server, what the last load did, and nothing else."""
        names, known = [want.name for want in load.used.values()], [want.name for want in last]
        return set(names) <= set(known) and (paused or names[0] != known[0])


class _Loads(LRUCache[str, Load]):
    """The loads under way; those that do not fit end."""

    def __init__(self, most: int, ended: Callable[[Load], None]) -> None:
        super().__init__(most)
        self._ended = ended

    def popitem(self) -> tuple[str, Load]:
        key, load = super().popitem()
        self._ended(load)
        return key, load
