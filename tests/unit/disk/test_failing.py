"""A disk, or an index, that fails costs no byte."""

import errno
import logging
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.parts import content_of, failing, fill, generation_of, opened, recorded_bytes, states
from tests.support.tmpfs import tmpfs
from tests.unit.disk.common import MISSING, UNVERIFIED, FailingWrites, here, small, store
from trimsfs.errors import CacheError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.index.index import BlobIndex


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
async def test_a_disk_that_turns_out_full_makes_room_and_is_tried_again(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    b = small("b", chunk_size)
    async with opened(cache) as tier:
        await fill(tier, "a", small("a", chunk_size, 2))
        writes = FailingWrites(monkeypatch, error, times=1)
        async with tier.blobs.using(generation_of("b", b)) as blob:
            assert await store(tier, blob, b, 0) == [True]
            assert blob.view(0, chunk_size) == b
        assert writes.calls == 2
        assert await here(tier) == {"b": chunk_size}
        assert tier.statistics().used_bytes == chunk_size


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
async def test_a_disk_that_cannot_be_written_declines(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock, error: int
) -> None:
    """Other models are evicted only if it is full."""
    del mock_clock
    b = small("b", chunk_size)
    async with opened(cache) as tier:
        await fill(tier, "a", small("a", chunk_size))
        FailingWrites(monkeypatch, error)
        async with tier.blobs.using(generation_of("b", b)) as blob:
            assert await store(tier, blob, b, 0) == [False]
            assert states(blob) == [MISSING]
            assert tier.space.full(generation_of("b", b))
        assert await here(tier) == ({} if error == errno.ENOSPC else {"a": chunk_size})
        assert tier.statistics().used_bytes == await recorded_bytes(tier)
        assert tier.statistics().refused_chunks == 1


async def test_a_real_full_disk_declines_and_serves_on(tmp_path: Path, chunk_size: int) -> None:
    size = 4 << 20
    content = content_of("a", 2 * size)
    with tmpfs(tmp_path / "disk", size) as cache:
        async with opened(cache) as tier, tier.blobs.using(generation_of("a", content)) as blob:
            kept = await store(tier, blob, content, *range(len(blob.states)))
            stop = sum(kept) * chunk_size
            assert 0 < sum(kept) < len(kept)
            assert kept == [True] * sum(kept) + [False] * (len(kept) - sum(kept))
            assert blob.readable(0, stop)
            assert blob.view(0, stop) == content[:stop]
            assert tier.statistics().used_bytes == stop


@pytest.mark.parametrize("method", ["remove", "evictable"])
async def test_an_index_that_fails_while_room_is_made_declines(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    b = small("b", chunk_size)
    async with opened(cache, budget=chunk_size) as tier:
        await fill(tier, "a", small("a", chunk_size))
        monkeypatch.setattr(BlobIndex, method, failing(sqlite3.SQLITE_ERROR))
        async with tier.blobs.using(generation_of("b", b)) as blob:
            assert await store(tier, blob, b, 0) == [False]


async def test_an_index_that_cannot_be_written_keeps_the_chunks_for_later(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(cache) as tier:
        with monkeypatch.context() as patch:
            patch.setattr(BlobIndex, "add_chunks", failing(sqlite3.SQLITE_IOERR))
            await fill(tier, "a", small("a", chunk_size))
            with caplog.at_level(logging.ERROR):
                await tier.journal.flush()
            assert "cannot write the cache index: as told" in caplog.text
        assert await here(tier) == {"a": chunk_size}


async def test_a_pin_that_cannot_be_recorded_is_an_error_of_the_cache(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything else would end the server that carries the command."""
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
        monkeypatch.setattr(BlobIndex, "set_pinned", failing(sqlite3.SQLITE_FULL))
        async with tier.blobs.using(generation) as blob:
            with pytest.raises(CacheError, match="as told"):
                await tier.residencies.pin(blob, True)
            assert not blob.pinned


async def test_a_cache_directory_that_is_removed_under_the_server_declines(cache: Path, chunk_size: int) -> None:
    a, b = small("a", chunk_size), small("b", chunk_size)
    async with opened(cache) as tier, tier.blobs.using(generation_of("a", a)) as before:
        shutil.rmtree(cache)
        assert await store(tier, before, a, 0) in ([True], [False])
        async with tier.blobs.using(generation_of("b", b)) as after:
            assert await store(tier, after, b, 0) == [False]


@contextmanager
def without_descriptors() -> Iterator[None]:
    """The file of no blob can be opened, which is soon given up."""

    def fail(*_: object, **__: object) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Blob, "attach", fail)
        patch.setattr("trimsfs.concurrency.descriptors.PATIENCE_S", 0.1)
        yield


async def test_a_blob_without_a_file_is_served_without_being_kept_until_the_next_open(
    cache: Path, chunk_size: int
) -> None:
    a = small("a", chunk_size)
    async with opened(cache) as tier:
        with without_descriptors():
            async with tier.blobs.using(generation_of("a", a)) as blob:
                assert not blob.attached
                assert await store(tier, blob, a, 0) == [False]
                assert tier.statistics().used_bytes == 0
        async with tier.blobs.using(generation_of("a", a)) as blob:
            assert await store(tier, blob, a, 0) == [True]


async def test_evicting_a_blob_that_could_not_be_attached_frees_what_is_on_disk(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
    async with opened(cache) as tier:
        with without_descriptors():
            async with tier.blobs.using(generation):
                pass
            assert await tier.residencies.evict(generation) == chunk_size
        assert tier.statistics().used_bytes == 0 == await recorded_bytes(tier)


async def test_what_is_found_twice_is_counted_once(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size, 2))
    async with opened(cache) as tier, tier.blobs.using(generation) as blob:
        for crc in (None, None, blob.crc(0)):  # the last has read it before
            assert not await tier.damage.check_chunk(blob, 0, crc)
        assert states(blob) == [MISSING, UNVERIFIED]
        assert tier.statistics().used_bytes == chunk_size


@pytest.mark.parametrize("evicted_first", [True, False])
async def test_a_blob_that_does_not_reach_the_disk_may_be_evicted_meanwhile(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, evicted_first: bool
) -> None:
    failed = threading.Event()

    def sync(_: Blob) -> None:
        assert failed.wait(20)
        raise OSError(errno.EIO, "the disk fails")

    content = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
        await tier.journal.flush()
        monkeypatch.setattr(Blob, "sync", sync)
        monkeypatch.setattr("trimsfs.tiers.disk.budget.FULL_FOR_S", 60)  # however slow this machine is
        async with trio.open_nursery() as nursery, tier._state.lock:
            nursery.start_soon(tier.journal.sync)
            if not evicted_first:
                failed.set()
                await wait_all_tasks_blocked(0.2)
            nursery.start_soon(tier.evictor.evict, tier.blobs.token(generation), "a")
            await wait_all_tasks_blocked(0.2)
            failed.set()
            await wait_all_tasks_blocked(0.2)
        assert await here(tier) == {}
        assert tier.statistics().used_bytes == 0
        async with tier.blobs.using(generation) as again:
            assert await store(tier, again, content, 0, 1) == [False, False]  # the disk fails
