"""Comparisons that take a pass over the bytes come after all that somebody waits for."""

from collections.abc import Callable
from functools import partial

import pytest
import trio

from tests.support.held import reached
from tests.support.parts import blob_files, blob_of, content_of, flip_byte, until
from tests.support.served import FakeBacking, Server, Serving
from tests.support.stores import MemoryStore
from tests.unit.integrity.common import Scene, counted, counts_of, digest_of, opened
from trimsfs.handover.ledger import Ledger
from trimsfs.integrity.deferred import LOOKS, Pace
from trimsfs.stores.digests import Algorithm

NAMES = [f"shard-{number}" for number in range(4)]


class Digests:
    """The digests that a server has had computed: in idle time or not, and how many at once."""

    def __init__(self, server: Server) -> None:
        self.idle: list[bool] = []
        self.most = self._now = 0
        self._real = server.integrity.comparer._copier.digest
        server.integrity.comparer._copier.digest = self._digest  # type: ignore[method-assign]

    async def _digest(
        self, descriptor: int, size: int, algorithm: Algorithm, part_size: int, *, idle: bool = False
    ) -> bytes | None:
        self.idle.append(idle)
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await trio.sleep(0.02)
            return await self._real(descriptor, size, algorithm, part_size, idle=idle)
        finally:
            self._now -= 1


@pytest.fixture
def serving(serving: Serving) -> Serving:
    """Starts a server that compares only what a test has opened."""
    return partial(serving, prefetch="off")


@pytest.fixture
def shards(store: MemoryStore, content: bytes) -> MemoryStore:
    for name in NAMES:
        store.put(name, content_of(name, len(content)))
        store.digests[name] = digest_of(content_of(name, len(content)), "md5", certain=False)
    return store


async def test_no_digest_is_computed_while_more_is_loaded(serving: Serving, shards: MemoryStore) -> None:
    pace = Pace(idle_s=0.2, at_once=2)
    async with serving(pace=pace) as server:
        digests = Digests(server)
        gate = shards.block(method="read", key=NAMES[-1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.content, NAMES[-1])
            await reached(gate)
            handles = [await opened(server, name) for name in NAMES[:-1]]
            await trio.sleep(3 * pace.idle_s)
            assert (digests.idle, counts_of(server).to_compare) == ([], len(NAMES) - 1)
            assert await server.attribute(NAMES[0], "verified") == "false"
            gate.set()
        await counted(server, to_compare=0, compared=len(NAMES))
        assert digests.idle == [True] * len(NAMES)
        assert digests.most == pace.at_once
        assert await server.attribute(NAMES[0], "verified") == "true"
        for handle in handles:
            server.release(handle)


async def test_what_differs_is_found_and_mended_then(serving: Serving, shards: MemoryStore, content: bytes) -> None:
    shards.corrupt(NAMES[1], 77)
    async with serving() as server:
        handles = [await opened(server, name) for name in NAMES]
        await counted(server, to_compare=0)
        counts = counts_of(server)
        assert (counts.compared, counts.differing, counts.repaired_chunks) == (len(NAMES), 1, 1)
        assert await server.read(handles[1]) == content_of(NAMES[1], len(content))


async def test_what_differs_from_a_certain_digest_is_quarantined_then(
    serving: Serving, shards: MemoryStore, content: bytes
) -> None:
    shards.digests["shard-1"] = digest_of(content, "sha256")
    async with serving() as server:
        handle = await opened(server, "shard-1")
        await counted(server, doubtful=1, to_compare=0)
        server.release(handle)


async def test_a_host_that_is_never_idle_compares_within_the_bound(
    serving: Serving, shards: MemoryStore, content: bytes
) -> None:
    """Somebody reads all the time what the server answers: by then it is compared at the fetch processes' priority."""
    pace = Pace(idle_s=0.5, latest_s=1)
    async with serving(pace=pace, backing=None) as server:
        quiet_s, quiet = server.integrity._deferred._quiet_s, [0.0]

        def seen() -> float:
            quiet.append(quiet_s())
            return quiet[-1]

        server.integrity._deferred._quiet_s = seen
        digests, handles = Digests(server), [await server.open(name) for name in NAMES]
        began = trio.current_time()
        while counts_of(server).compared < len(NAMES):
            assert trio.current_time() - began < 60
            assert await server.read(handles[0]) == content_of(NAMES[0], len(content))
            await trio.sleep(0.01)
        if max(quiet) < pace.idle_s:  # else this machine has stood still
            assert trio.current_time() - began > pace.latest_s
            assert (digests.idle, digests.most) == ([False] * len(NAMES), 1)


async def test_one_that_gets_no_idle_time_goes_on_without(
    serving: Serving, shards: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host became busy once its digest was begun."""
    pace = Pace(idle_s=0.01, latest_s=2.0)
    async with serving(pace=pace) as server:
        copier, began = server.integrity.comparer._copier, list[bool]()
        real = copier.digest

        async def starved(*job: object, idle: bool = False) -> bytes | None:
            began.append(idle)
            if idle:
                await trio.sleep_forever()
            return await real(*job)  # type: ignore[arg-type]

        monkeypatch.setattr(copier, "digest", starved)
        await opened(server, NAMES[0])
        await counted(server, compared=1)
        assert began == [True, False]


async def test_verify_does_not_wait(serving: Serving, shards: MemoryStore) -> None:
    async with serving(pace=Pace(idle_s=1000)) as server:
        digests = Digests(server)
        await opened(server, NAMES[0])
        assert counts_of(server).to_compare == 1
        assert await server.outcome("verify", NAMES[0]) == ("done", None)
        assert (digests.idle, counts_of(server).to_compare) == ([False], 0)
        assert await server.attribute(NAMES[0], "verified") == "true"


async def test_what_is_evicted_meanwhile_is_not_counted_any_more(serving: Serving, shards: MemoryStore) -> None:
    pace = Pace(idle_s=0.1 * LOOKS, latest_s=1000)
    async with serving(pace=pace) as server:
        gate = shards.block(method="read", key=NAMES[-1])
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.content, NAMES[-1])
            await reached(gate)
            server.release(await opened(server, NAMES[0]))
            await until(lambda: blob_of(server.disk, shards, NAMES[0]).users == 0)
            assert counts_of(server).to_compare == 1
            await server.disk.residencies.evict(shards.generation(NAMES[0]))
            await counted(server, to_compare=0)
            gate.set()


async def test_the_next_server_compares_what_this_one_has_not(
    serving: Serving, shards: MemoryStore, scene: Scene, ledger: Callable[[], Ledger]
) -> None:
    backing = FakeBacking()
    start = partial(serving, backing=backing)
    async with start(pace=Pace(idle_s=1000), ledger=ledger()) as server:
        for name in NAMES:
            await opened(server, name)
        await server.disk.journal.flush()
        assert counts_of(server).compared == 0
    flip_byte(blob_files(scene.cache)[0], 5)
    async with start(ledger=ledger()) as server:
        await counted(server, compared=len(NAMES), to_compare=0, repaired_chunks=1)
    for file in blob_files(scene.cache):
        assert file.read_bytes() in {content_of(name, len(scene.content)) for name in NAMES}
    backing.dispose()
