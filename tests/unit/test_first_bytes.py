"""First bytes come alone from the store, while their chunk is stuck behind others."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import InLoop, content_of, until
from tests.support.served import FakeBacking, Serving
from tests.support.signing import sign
from tests.support.stores import MemoryStore, as_store
from tests.unit.signature_policy.common import KEY
from tests.unit.workshop import Bench, Workshop
from trimsfs.errors import StoreUnavailableError
from trimsfs.extras.signatures.signed_manifest import read_manifest
from trimsfs.fetch import bypass
from trimsfs.fetch.bypass import HEAD_BYTES, LEAST_SIZE, MOST_SHARE, PATIENCE_S, AccessPattern
from trimsfs.tiers.blob import Blob

SIZE = 2 * LEAST_SIZE
CONTENT = content_of("large", SIZE)
FAR = SIZE // 2
MOST = int(MOST_SHARE * SIZE)
QUIET_S = 3 * PATIENCE_S


@dataclass(slots=True)
class Stuck:
    """A large file whose chunks are held back until the *gate* is set, and which comes in small requests otherwise.

    Requests for chunks and those that the server makes itself go to stores of their own, which are counted apart.
    """

    bench: Bench
    blob: Blob
    direct: MemoryStore
    gate: trio.Event
    pattern: AccessPattern

    async def read(self, start: int, size: int) -> bytes:
        """As an open file is read."""
        data = await self.bench.fetcher.read_once(self.blob, start, start + size, self.pattern)
        assert data is not None
        return bytes(data)

    async def waits(self, read: Callable[[], Awaitable[bytes]]) -> bool:
        """Whether a read does not get its bytes while the chunks are stuck."""
        with trio.move_on_after(QUIET_S) as scope:
            await read()
        return scope.cancelled_caught

    def requests(self) -> list[tuple[int, int]]:
        """The offset and length of each small request."""
        return [(request.offset, request.length) for request in self.direct.requests]


@pytest.fixture
async def stuck(streaming: Workshop) -> AsyncIterator[Stuck]:
    stuck = await a_stuck_file(streaming, CONTENT)
    yield stuck
    stuck.gate.set()


async def a_stuck_file(workshop: Workshop, content: bytes) -> Stuck:
    workshop.store.put("large", content)
    direct = MemoryStore({"large": content}, streaming=True)
    gate = workshop.store.block()
    bench = await workshop.bench(transfer=InLoop(as_store(workshop.store), threads=8), direct=direct)
    blob = await bench.acquire("large")
    bench.fetcher.hold(blob)
    return Stuck(bench, blob, direct, gate, AccessPattern())


async def test_the_first_bytes_come_by_a_request_of_their_own(stuck: Stuck) -> None:
    with trio.fail_after(5):
        assert await stuck.read(0, 8) == CONTENT[:8]
    assert stuck.bench.store.fetched.total() == 0
    assert stuck.requests() == [(0, HEAD_BYTES)]


async def test_the_head_is_fetched_once_for_all_who_read_it(stuck: Stuck) -> None:
    draw = random.Random(5)

    async def read() -> None:
        start = draw.randrange(HEAD_BYTES - 5000)
        assert await stuck.read(start, 5000) == CONTENT[start : start + 5000]

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(read)
    assert stuck.requests() == [(0, HEAD_BYTES)]
    assert stuck.blob.verified_bytes == 0


async def test_bytes_further_on_come_in_just_their_size(stuck: Stuck, chunk_size: int) -> None:
    """Also across chunks."""
    ranges = [(FAR + 3, 8), (FAR + chunk_size - 1000, 2000)]
    with trio.fail_after(5):
        for start, size in ranges:
            assert await stuck.read(start, size) == CONTENT[start : start + size]
    assert stuck.requests() == ranges


async def test_only_a_share_of_a_file_comes_so(stuck: Stuck, chunk_size: int) -> None:
    size = MOST // 4
    assert size > chunk_size
    with trio.fail_after(5):
        for number in range(4):
            start = FAR + number * size
            assert await stuck.read(start, size) == CONTENT[start : start + size]
    assert await stuck.waits(partial(stuck.read, FAR + 4 * size, 8 + MOST % 4))
    assert sum(length for _, length in stuck.requests()) == 4 * size <= MOST
    with trio.fail_after(5):  # the head does not count
        assert await stuck.read(0, 8) == CONTENT[:8]


async def test_only_so_many_bytes_of_a_file_come_so(stuck: Stuck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bypass, "MOST_BYTES", 10_000)
    assert await stuck.waits(partial(stuck.read, FAR, 10_001))
    assert stuck.requests() == []
    with trio.fail_after(5):
        assert await stuck.read(FAR, 6000) == CONTENT[FAR : FAR + 6000]
    assert await stuck.waits(partial(stuck.read, FAR + 6000, 4001))
    with trio.fail_after(5):
        assert await stuck.read(FAR + 6000, 4000) == CONTENT[FAR + 6000 : FAR + 10_000]
    assert await stuck.waits(partial(stuck.read, 2 * HEAD_BYTES, 1))
    assert sum(length for _, length in stuck.requests()) == 10_000


async def test_bytes_that_may_turn_out_wrong_do_not_come_alone(stuck: Stuck) -> None:
    """Without a pattern, they are checked with their file."""
    assert await stuck.waits(partial(stuck.bench.read, stuck.blob, 0, 8))
    assert stuck.requests() == []
    stuck.gate.set()
    assert await stuck.bench.read(stuck.blob, 0, 8) == CONTENT[:8]
    assert stuck.requests() == []


async def test_of_a_small_file_no_bytes_come_alone(streaming: Workshop) -> None:
    stuck = await a_stuck_file(streaming, CONTENT[: LEAST_SIZE - 1])
    assert await stuck.waits(partial(stuck.read, 0, 8))
    assert stuck.requests() == []


async def test_once_bytes_come_a_reader_is_patient(streaming: Workshop, chunk_size: int) -> None:
    stuck = await a_stuck_file(streaming, CONTENT)
    stuck.bench.fetcher.unhold(stuck.blob)
    stuck.gate.set()
    assert await stuck.bench.read(stuck.blob, 0, 8) == CONTENT[:8]
    await until(stuck.bench.idle)
    assert stuck.blob.verified_bytes == chunk_size
    stuck.bench.store.block()
    began = trio.current_time()
    with trio.fail_after(5):
        assert await stuck.read(FAR, 8) == CONTENT[FAR : FAR + 8]
    assert trio.current_time() - began >= PATIENCE_S
    assert stuck.requests() == [(FAR, 8)]


async def test_where_the_small_request_fails_the_chunk_brings_the_bytes(stuck: Stuck) -> None:
    stuck.direct.fail(StoreUnavailableError("down"), times=float("inf"))
    answers: list[bytes] = []

    async def read(start: int) -> None:
        answers.append(await stuck.read(start, 8))

    async with trio.open_nursery() as nursery:
        for start in (0, FAR):
            nursery.start_soon(read, start)
            await wait_all_tasks_blocked(0.01)
        assert {offset for offset, _ in stuck.requests()} == {0, FAR}
        assert answers == []
        stuck.gate.set()
    assert sorted(answers) == sorted([CONTENT[:8], CONTENT[FAR : FAR + 8]])


async def test_the_file_is_cached_all_the_same(stuck: Stuck) -> None:
    with trio.fail_after(5):
        assert await stuck.read(0, 8) == CONTENT[:8]
    stuck.gate.set()
    await until(lambda: stuck.blob.complete)
    assert stuck.blob.view(0, SIZE) == CONTENT
    assert await stuck.read(FAR, 8) == CONTENT[FAR : FAR + 8]
    assert stuck.requests() == [(0, HEAD_BYTES)]


# On a whole server


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore({"model/large": CONTENT, "model/model.sig": sign(KEY, {"large": CONTENT})}, streaming=True)


@pytest.mark.parametrize("size", [8, 70_000])
async def test_an_open_file_of_a_server_has_its_first_bytes_alone(
    serving: Serving, store: MemoryStore, size: int
) -> None:
    async with serving() as server:
        handle = await server.open("model/large")
        store.block(method="read", offset=FAR - FAR % server.disk.chunk_size)
        with trio.fail_after(5):
            assert await server.read(handle, FAR + 100, size) == CONTENT[FAR + 100 : FAR + 100 + size]
        assert [request.offset for request in store.requests if request.length == size] == [FAR + 100]


@pytest.mark.parametrize("options", [{"digests": "wait"}, {"signatures": "require"}], ids=str)
async def test_a_server_that_checks_files_before_their_bytes_are_read_lets_none_come_alone(
    serving: Serving, store: MemoryStore, options: dict[str, str]
) -> None:
    """Opens and reads a large file while its chunks are stuck: all requests for it are for whole chunks."""
    read_signed = partial(read_manifest, key=KEY.public_key()) if "signatures" in options else None
    async with serving(backing=FakeBacking(), read_manifest=read_signed, **options) as server:
        gate = store.block(method="read", key="model/large")
        opened: list[bytes] = []

        async def read() -> None:
            handle = await server.open("model/large")
            opened.append(await server.read(handle, FAR + 100, 8))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await trio.sleep(QUIET_S)
            assert store.reads("model/large")
            gate.set()
        assert opened == [CONTENT[FAR + 100 : FAR + 108]]
        requests = [each for each in store.requests if (each.method, each.key) == ("read", "model/large")]
        assert all(
            each.offset % server.disk.chunk_size == each.length % server.disk.chunk_size == 0 for each in requests
        )
        assert all(each.length != HEAD_BYTES for each in requests)
