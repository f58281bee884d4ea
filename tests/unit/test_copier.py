"""Moving bytes in this process; ``test_workers.py`` has others do the same."""

import errno
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import crc32c
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.chunks import SMALL_CHUNK
from tests.support.parts import content_of, copier, piece
from tests.support.stores import MemoryStore
from tests.support.tmpfs import tmpfs
from trimsfs.errors import ObjectChangedError, StoreAccessError, StoreError, StoreSlowError, TransientStoreError
from trimsfs.fetch.copier import Extent
from trimsfs.fetch.processes.thread_copier import FIRST_WRITE_SHARE, ThreadCopier
from trimsfs.stores.base import Sink
from trimsfs.tiers.host.page_cache import drop, resident_bytes
from trimsfs.tiers.ranges import chunk_count, chunk_span
from trimsfs.types import ChunkRecord, Generation


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A descriptor of an empty file."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def content(chunk_size: int) -> bytes:
    """Four whole chunks and a short one."""
    return content_of("a", 4 * chunk_size + 321)


@pytest.fixture(params=[False, True], ids=["at the end", "streaming"])
def store(request: pytest.FixtureRequest, content: bytes) -> MemoryStore:
    return MemoryStore({"a": content}, streaming=request.param)


@pytest.fixture
def late(content: bytes) -> MemoryStore:
    """A store that tells only at the end of a read whether its bytes are right."""
    return MemoryStore({"a": content})


@pytest.fixture
def streaming(content: bytes) -> MemoryStore:
    """A store whose bytes are right at once."""
    return MemoryStore({"a": content}, streaming=True)


def record_of(content: bytes, chunk: int) -> ChunkRecord:
    data = piece(content, chunk)
    return ChunkRecord(chunk=chunk, length=len(data), crc=crc32c.crc32c(data))


async def fetch(
    store: MemoryStore, chunks: range, descriptor: int, records: list[ChunkRecord], *, position: int | None = None
) -> str | None:
    """Copy chunks to where they lie in the object, or to *position*."""
    generation = store.generation("a")
    start = chunk_span(chunks[0], generation.size, SMALL_CHUNK)[0]
    stop = chunk_span(chunks[-1], generation.size, SMALL_CHUNK)[1]
    position = start if position is None else position
    return await copier(store).fetch(generation, Extent(start, stop, descriptor, position, SMALL_CHUNK), records.append)


class GivenUp(MemoryStore):
    """Gives a read up whose thread goes on: it may still call ``sink``."""

    sink: Sink

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        del generation, offset, length
        self.sink = sink
        sink(b"1")
        raise TransientStoreError("no complete answer")


# Fetching


async def test_what_comes_after_a_read_was_given_up_is_not_written(content: bytes, file: int) -> None:
    store = GivenUp({"a": content}, streaming=True)
    with pytest.raises(TransientStoreError):
        await fetch(store, range(1), file, [])
    with pytest.raises(StoreError, match="no longer wanted"):
        store.sink(content)
    assert os.fstat(file).st_size == 0


@pytest.mark.parametrize("chunks", [range(1), range(1, 3), range(2, 5), range(4, 5), range(5)])
@pytest.mark.parametrize("position", [None, 0, 12345])
async def test_any_run_of_chunks_goes_where_it_is_told_to(
    store: MemoryStore, content: bytes, file: int, chunk_size: int, chunks: range, position: int | None
) -> None:
    records: list[ChunkRecord] = []
    assert await fetch(store, chunks, file, records, position=position) is None
    wanted = content[chunks.start * chunk_size : chunks.stop * chunk_size]
    begin = chunks.start * chunk_size if position is None else position
    assert os.pread(file, len(wanted) + 1, begin) == wanted
    assert os.pread(file, begin, 0) == bytes(begin)
    assert records == [record_of(content, chunk) for chunk in chunks]


async def test_objects_of_any_size_are_copied_exactly(tmp_path: Path, chunk_size: int) -> None:
    draw = random.Random(1)
    for number in range(30):
        content = content_of(f"object {number}", draw.choice([1, chunk_size, draw.randrange(1, 5 * chunk_size)]))
        store = MemoryStore({"a": content}, streaming=number % 2 == 0)
        path = tmp_path / "file"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        records: list[ChunkRecord] = []
        await fetch(store, range(chunk_count(len(content), SMALL_CHUNK)), descriptor, records)
        os.close(descriptor)
        assert path.read_bytes() == content
        assert sum(record.length for record in records) == len(content)


async def test_a_partial_write_is_carried_on(
    store: MemoryStore, content: bytes, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    records: list[ChunkRecord] = []
    await fetch(store, range(5), file, records)
    assert os.pread(file, len(content), 0) == content
    assert records == [record_of(content, chunk) for chunk in range(5)]


async def test_the_version_that_the_store_gave_is_passed_on(store: MemoryStore, content: bytes, file: int) -> None:
    store.put("a", content, version_id="v1")
    assert await fetch(store, range(2), file, []) == "v1"


async def test_what_a_streaming_store_gives_lands_at_once(
    streaming: MemoryStore, content: bytes, file: int, chunk_size: int
) -> None:
    gate = streaming.block(after=2 * chunk_size + 100)
    records: list[ChunkRecord] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, streaming, range(5), file, records)
        await wait_all_tasks_blocked(0.01)
        assert records == [record_of(content, chunk) for chunk in range(2)]
        assert os.pread(file, 2 * chunk_size, 0) == content[: 2 * chunk_size]
        gate.set()
    assert records == [record_of(content, chunk) for chunk in range(5)]


async def test_what_another_store_gives_lands_once_it_is_known_to_be_right(
    late: MemoryStore, content: bytes, file: int, chunk_size: int
) -> None:
    gate = late.block(after=4 * chunk_size)
    records: list[ChunkRecord] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fetch, late, range(5), file, records)
        await wait_all_tasks_blocked(0.01)
        assert os.pread(file, 4 * chunk_size, 0) == content[: 4 * chunk_size]
        assert records == []
        gate.set()
    assert len(records) == 5


async def test_bytes_of_a_stream_are_told_of_once_they_are_in_the_file(
    streaming: MemoryStore, content: bytes, file: int, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.WRITE_SIZE", chunk_size // 3)
    heard: list[int] = []

    def arrived(offset: int) -> None:
        assert os.pread(file, offset - chunk_size, 0) == content[chunk_size:offset]
        heard.append(offset)

    generation = streaming.generation("a")
    await copier(streaming).fetch(
        generation, Extent(chunk_size, generation.size, file, 0, SMALL_CHUNK), lambda _: None, arrived, eager=True
    )
    assert heard == sorted(set(heard))
    # Of a chunk that is whole, its landing tells.
    assert {offset // chunk_size for offset in heard} == {1, 2, 3}
    assert all(offset % chunk_size for offset in heard)


async def test_first_bytes_that_a_reader_waits_for_are_written_sooner(
    streaming: MemoryStore, file: int, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.WRITE_SIZE", chunk_size // 2)
    sizes: list[int] = []
    pwrite = os.pwrite

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write)
    generation = streaming.generation("a")
    heard: list[int] = []
    extent = Extent(0, chunk_size, file, 0, SMALL_CHUNK)
    await copier(streaming).fetch(generation, extent, lambda _: None, heard.append, eager=True)
    first = chunk_size // 2 // FIRST_WRITE_SHARE
    assert sizes == [first, chunk_size // 2 - first, chunk_size // 2]
    assert heard == [first, chunk_size // 2]
    sizes.clear()
    await copier(streaming).fetch(generation, Extent(0, chunk_size, file, 0, SMALL_CHUNK), lambda _: None)
    assert sizes == [chunk_size // 2] * 2


async def test_bytes_that_may_turn_out_wrong_are_not_told_of(late: MemoryStore, file: int) -> None:
    heard: list[int] = []
    generation = late.generation("a")
    await copier(late).fetch(generation, Extent(0, generation.size, file, 0, SMALL_CHUNK), lambda _: None, heard.append)
    assert heard == []


# Failures


async def test_what_came_before_a_stream_breaks_has_landed(
    streaming: MemoryStore, content: bytes, file: int, chunk_size: int
) -> None:
    error = TransientStoreError("reset")
    streaming.fail(error, after=3 * chunk_size - 1)
    records: list[ChunkRecord] = []
    with pytest.raises(TransientStoreError) as caught:
        await fetch(streaming, range(5), file, records)
    assert caught.value is error
    assert records == [record_of(content, chunk) for chunk in range(2)]


async def test_a_part_that_came_too_slowly_does_not_land(
    streaming: MemoryStore, file: int, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.LEAST_PART", 1000)
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.LEAST_PART_RATE", 1e12)
    streaming.fail(StoreSlowError("few bytes"), after=chunk_size + 1000)
    records: list[ChunkRecord] = []
    with pytest.raises(StoreSlowError):
        await fetch(streaming, range(3), file, records)
    assert [record.length for record in records] == [chunk_size]


async def test_the_part_of_a_chunk_that_came_before_a_stream_broke_has_landed_and_is_in_the_file(
    streaming: MemoryStore, content: bytes, file: int, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.LEAST_PART", 1000)
    monkeypatch.setattr("trimsfs.fetch.processes.thread_copier.LEAST_PART_RATE", 0)
    failures: list[tuple[StoreError, int, list[int]]] = [
        (TransientStoreError("reset"), chunk_size + 1000, [chunk_size, 1000]),
        (TransientStoreError("reset"), 999, []),
        (StoreAccessError("denied"), chunk_size + 1000, [chunk_size]),
    ]
    for error, after, expected in failures:
        streaming.fail(error, after=after)
        records: list[ChunkRecord] = []
        with pytest.raises(StoreError):
            await fetch(streaming, range(3), file, records)
        assert [record.length for record in records] == expected
        for record in records:
            start = record.chunk * chunk_size
            part = content[start : start + record.length]
            assert os.pread(file, record.length, start) == part
            assert record.crc == crc32c.crc32c(part)


@pytest.mark.parametrize("after", [0, 50_000])
async def test_nothing_lands_of_a_read_that_another_store_takes_back(
    late: MemoryStore, content: bytes, file: int, after: int
) -> None:
    assert after < len(content)
    late.fail(ObjectChangedError("changed"), after=after)
    records: list[ChunkRecord] = []
    with pytest.raises(ObjectChangedError):
        await fetch(late, range(5), file, records)
    assert records == []


async def test_a_full_disk_is_the_error_of_a_file_and_not_of_a_store(
    store: MemoryStore, content: bytes, tmp_path: Path, chunk_size: int
) -> None:
    records: list[ChunkRecord] = []
    with tmpfs(tmp_path / "disk", 2 * chunk_size + 4096) as directory:
        descriptor = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
        with pytest.raises(OSError, match="No space left on device") as caught:
            await fetch(store, range(5), descriptor, records)
        assert caught.value.errno == errno.ENOSPC
        assert os.pread(descriptor, 2 * chunk_size, 0) == content[: 2 * chunk_size]
        os.close(descriptor)
    assert records == [record_of(content, chunk) for chunk in range(2)][: 2 * store.streaming]


async def test_what_a_store_gives_beyond_what_was_asked_for_is_written_nowhere(
    content: bytes, file: int, chunk_size: int
) -> None:
    class Generous(MemoryStore):
        async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
            return await super().read(generation, offset, length + 1, sink)

    with pytest.raises(StoreError, match="the store sent more bytes than requested"):
        await fetch(Generous({"a": content}), range(2), file, [])
    assert os.fstat(file).st_size == 2 * chunk_size


# Checking


async def test_a_large_range_is_checked_in_pieces_and_short_reads_are_carried_on(
    store: MemoryStore, content: bytes, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.pwrite(file, content, 0)
    preadv = os.preadv
    monkeypatch.setattr("trimsfs.checksums._PIECE", 1000)
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:777]], offset))
    assert await copier(store).checksum(file, 5, len(content)) == crc32c.crc32c(content[5:])


async def test_no_more_threads_work_than_allowed(
    late: MemoryStore, content: bytes, file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.pwrite(file, content, 0)
    preadv, at_once = os.preadv, threading.Semaphore(2)
    free: list[bool] = []

    def read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        free.append(at_once.acquire(blocking=False))
        time.sleep(0.001)
        try:
            return preadv(descriptor, buffers, offset)
        finally:
            at_once.release()

    monkeypatch.setattr(os, "preadv", read)
    moving = ThreadCopier(late, threads=2)
    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(moving.checksum, file, 0, len(content))
    assert len(free) >= 20
    assert all(free)


# Memory


async def test_populating_brings_a_range_into_memory(late: MemoryStore, chunk_size: int) -> None:
    with tempfile.TemporaryFile(dir="/var/tmp") as file:  # /tmp may be in memory
        size = 3 * chunk_size + 100
        file.write(content_of("a", size))
        file.flush()
        descriptor = file.fileno()
        drop(descriptor)
        if resident_bytes(descriptor) != 0:
            pytest.skip("this kernel does not tell what is in its page cache, or keeps all of it")
        await copier(late).populate(descriptor, chunk_size, 2 * chunk_size)
        resident = resident_bytes(descriptor)
        assert resident is not None
        assert resident >= chunk_size
        await copier(late).populate(descriptor, 0, size)
        resident = resident_bytes(descriptor)
        assert resident is not None
        assert resident >= size
