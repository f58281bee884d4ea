import errno
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.unit.parts import (
    blob_files,
    content_of,
    fill,
    flip_byte,
    generation_of,
    opened,
    piece,
    recorded_bytes,
    states,
    store_chunk,
    until,
    verify_chunk,
)
from tests.unit.tmpfs import tmpfs
from trimsfs.errors import CacheError, CacheInUseError, CacheUnusableError, InUseError
from trimsfs.eviction import Evictable
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk import DiskTier
from trimsfs.tiers.index import BlobIndex
from trimsfs.types import ChunkRecord

MISSING, UNVERIFIED, VERIFIED = ChunkState


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def small(key: str, chunk_size: int, chunks: float = 1) -> bytes:
    """The content of an object of so many chunks."""
    return content_of(key, int(chunks * chunk_size))


async def here(tier: DiskTier) -> dict[str, int]:
    """Bytes on disk of every object that has some."""
    return {found.generation.key: found.disk_bytes for found in await tier.residencies() if found.disk_bytes}


async def store(tier: DiskTier, blob: Blob, content: bytes, *chunks: int) -> list[bool]:
    return [await store_chunk(tier, blob, chunk, piece(content, chunk)) for chunk in chunks]


def put_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def remove_index(cache: Path) -> None:
    for path in cache.glob("index.sqlite*"):
        path.unlink()


class FailingWrites:
    """Stands in for os.pwrite and fails as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: int, *, times: float = float("inf")) -> None:
        self.times = times
        self.calls = 0
        self._error = error
        self._pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", self)

    def __call__(self, descriptor: int, data: memoryview, offset: int) -> int:
        self.calls += 1
        if self.calls <= self.times:
            raise OSError(self._error, os.strerror(self._error))
        return self._pwrite(descriptor, data, offset)


# The directory


async def test_a_second_server_may_not_use_the_directory(cache: Path) -> None:
    async with opened(cache):
        with pytest.raises(CacheInUseError, match=rf"{cache} is in use .* \(pid {os.getpid()}\): unmount"):
            DiskTier(cache, store="other")
    async with opened(cache):
        pass


async def test_the_directory_is_made_private(tmp_path: Path) -> None:
    async with opened(tmp_path / "a/b/cache"):
        assert (tmp_path / "a/b/cache").stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheUnusableError, match=r"cache directory .*/file/cache: Not a directory: set --cache-dir"):
        DiskTier(tmp_path / "file/cache", store="s")


def test_a_file_as_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheUnusableError, match=r"cache directory .*/file: "):
        DiskTier(tmp_path / "file", store="s")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_directory_that_may_not_be_written_is_reported() -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(CacheUnusableError, match=r"cache directory .*: Permission denied: set --cache-dir"):
                DiskTier(Path(directory), store="s")
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("in_the_way", ["blobs", "index.sqlite/file"])
async def test_a_tier_that_cannot_be_opened_gives_up_the_lock(cache: Path, in_the_way: str) -> None:
    """There is a file where a directory should be, or the other way round."""
    put_file(cache / in_the_way)
    with pytest.raises(CacheUnusableError):
        DiskTier(cache, store="s")
    os.unlink(cache / in_the_way)
    if "/" in in_the_way:
        os.rmdir(cache / "index.sqlite")
    async with opened(cache):
        pass


# Storing and finding again


async def test_a_stored_chunk_is_served_and_counted(cache: Path, chunk_size: int) -> None:
    content = small("a", chunk_size, 2.5)
    async with opened(cache) as tier, tier.using(generation_of("a", content)) as blob:
        assert await store(tier, blob, content, 1, 2) == [True, True]
        assert states(blob) == [MISSING, VERIFIED, VERIFIED]
        assert blob.view(chunk_size, len(content)) == content[chunk_size:]
        assert tier.statistics().used_bytes == len(content) - chunk_size
        assert await here(tier) == {"a": len(content) - chunk_size}


async def test_an_empty_object_takes_no_place(cache: Path) -> None:
    async with opened(cache) as tier, tier.using(generation_of("a", b"")) as blob:
        assert blob.complete
        assert blob_files(cache) == []


async def test_the_same_generation_is_the_same_blob(cache: Path) -> None:
    generation = generation_of("a", b"content")
    async with opened(cache) as tier:
        blobs: list[Blob] = []

        async def acquire() -> None:
            blobs.append(await tier.acquire(generation))

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(acquire)
        assert len({id(blob) for blob in blobs}) == 1
        assert blobs[0].users == 10
        assert tier.statistics().open_blobs == 1
        for blob in blobs:
            tier.release(blob)
        assert tier.statistics().open_blobs == 0


async def test_another_content_of_a_key_is_another_blob(cache: Path) -> None:
    async with opened(cache) as tier, tier.using(generation_of("a", b"one")) as one:
        async with tier.using(generation_of("a", b"two")) as two:
            assert one is not two
        assert len(blob_files(cache)) == 2


async def test_chunks_come_back_unverified_after_a_restart_and_verify(cache: Path, chunk_size: int) -> None:
    content = small("a", chunk_size, 2.5)
    async with opened(cache) as tier, tier.using(generation_of("a", content)) as blob:
        await store(tier, blob, content, 0, 2)
    async with opened(cache) as tier:
        assert tier.statistics().used_bytes == chunk_size + chunk_size // 2
        async with tier.using(generation_of("a", content)) as blob:
            assert states(blob) == [UNVERIFIED, MISSING, UNVERIFIED]
            assert await verify_chunk(tier, blob, 0)
            assert await verify_chunk(tier, blob, 2)
            assert states(blob) == [VERIFIED, MISSING, VERIFIED]
            assert blob.view(0, chunk_size) == content[:chunk_size]
            assert tier.statistics().used_bytes == chunk_size + chunk_size // 2
            assert tier.statistics().corrupt_chunks == 0


async def test_chunks_survive_a_server_that_is_killed(cache: Path, chunk_size: int, tmp_path: Path) -> None:
    content = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
        await tier.flush()
        # What lies in the directory now is what a killed server leaves.
        shutil.copytree(cache, tmp_path / "left")
    async with opened(tmp_path / "left") as tier, tier.using(generation) as blob:
        assert states(blob) == [UNVERIFIED, UNVERIFIED]
        assert await verify_chunk(tier, blob, 1)


async def test_chunks_that_were_not_synced_do_not_survive_a_boot(
    cache: Path, chunk_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("one")
    monkeypatch.setattr("trimsfs.tiers.index.BOOT_ID", boot_id)
    a, b = small("a", chunk_size), small("b", chunk_size)
    async with opened(cache) as tier:
        await fill(tier, "a", a)
    async with opened(cache) as tier:
        await fill(tier, "b", b)
        await tier.flush()
        shutil.copytree(cache, tmp_path / "left")
    boot_id.write_text("two")
    async with opened(tmp_path / "left") as tier:
        assert await here(tier) == {"a": chunk_size}
        assert tier.statistics().used_bytes == chunk_size


async def test_a_flipped_byte_makes_the_chunk_missing(cache: Path, chunk_size: int) -> None:
    content = small("a", chunk_size, 2.5)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
    flip_byte(blob_files(cache)[0], chunk_size + 5)
    async with opened(cache) as tier, tier.using(generation) as blob:
        assert not await verify_chunk(tier, blob, 1)
        assert states(blob) == [UNVERIFIED, MISSING, UNVERIFIED]
        assert tier.statistics().corrupt_chunks == 1
        assert tier.statistics().used_bytes == len(content) - chunk_size == await recorded_bytes(tier)
        assert await store(tier, blob, content, 1) == [True]
        assert tier.statistics().used_bytes == len(content) == await recorded_bytes(tier)


async def test_a_chunk_that_cannot_be_read_is_missing(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    async with opened(cache) as tier, tier.using(generation) as blob:
        monkeypatch.setattr(os, "preadv", fail)
        assert not await verify_chunk(tier, blob, 0)
        assert states(blob) == [MISSING]
        assert tier.statistics().used_bytes == 0


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: os.truncate(path, 100), lambda path: os.truncate(path, 0)]
)
async def test_a_blob_that_is_gone_or_of_another_size_is_fetched_again(
    cache: Path, chunk_size: int, damage: Callable[[Path], None]
) -> None:
    content = small("a", chunk_size, 2.5)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
        await fill(tier, "b", small("b", chunk_size))
    path = next(path for path in blob_files(cache) if path.stat().st_size == len(content))
    damage(path)
    async with opened(cache) as tier, tier.using(generation) as blob:
        assert states(blob) == [MISSING] * 3
        assert tier.statistics().used_bytes == chunk_size == await recorded_bytes(tier)
        assert await store(tier, blob, content, 0, 1, 2) == [True] * 3
        assert blob.view(0, len(content)) == content
        assert tier.statistics().used_bytes == len(content) + chunk_size == await recorded_bytes(tier)


async def test_a_directory_without_its_index_starts_empty(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
    remove_index(cache)
    async with opened(cache) as tier:
        assert tier.statistics().used_bytes == 0
        async with tier.using(generation) as blob:
            assert states(blob) == [MISSING]


async def test_files_that_the_index_does_not_know_are_removed(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        await fill(tier, "a", small("a", chunk_size))
        (known,) = blob_files(cache)
    stray = [cache / "blobs/ab/ab00", cache / "blobs/cd/cd00", known.with_name("other")]
    for path in stray:
        put_file(path)
    async with opened(cache) as tier, trio.open_nursery() as nursery:
        nursery.start_soon(tier.run)
        await until(lambda: not any(path.exists() for path in stray))
        nursery.cancel_scope.cancel()
    assert blob_files(cache) == [known]


async def test_a_running_tier_records_what_is_written_and_syncs_it(
    cache: Path, chunk_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.tiers.upkeep.FLUSH_INTERVAL_S", 0.001)
    monkeypatch.setattr("trimsfs.tiers.upkeep.SYNC_INTERVAL_S", 0.002)
    synced = trio.Event()
    mark_synced = BlobIndex.mark_synced
    token = trio.lowlevel.current_trio_token()

    def mark(index: BlobIndex, name: str, chunks: "frozenset[int]") -> None:
        mark_synced(index, name, chunks)
        if chunks:  # there are none while the chunk is not recorded yet
            token.run_sync_soon(synced.set)

    monkeypatch.setattr(BlobIndex, "mark_synced", mark)
    async with opened(cache) as tier, trio.open_nursery() as nursery:
        nursery.start_soon(tier.run)
        await fill(tier, "a", small("a", chunk_size))
        with trio.fail_after(5):
            await synced.wait()
        shutil.copytree(cache, tmp_path / "left")
        nursery.cancel_scope.cancel()
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another")
    monkeypatch.setattr("trimsfs.tiers.index.BOOT_ID", boot_id)
    async with opened(tmp_path / "left") as tier:
        assert await here(tier) == {"a": chunk_size}


async def test_a_chunk_that_is_being_recorded_while_its_blob_is_synced_is_synced_later(
    cache: Path, chunk_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.tiers.upkeep.FLUSH_INTERVAL_S", 0.001)
    monkeypatch.setattr("trimsfs.tiers.upkeep.SYNC_INTERVAL_S", 0.0)
    syncing, sync_on, recording, record_on = (threading.Event() for _ in range(4))
    sync, add_chunks = Blob.sync, BlobIndex.add_chunks

    def slow_sync(blob: Blob) -> None:
        if blob.generation.key == "a":
            syncing.set()
            sync_on.wait(5)
        sync(blob)

    def slow_add(index: BlobIndex, chunks: list[tuple[str, ChunkRecord]]) -> None:
        if [record.chunk for _, record in chunks] == [1]:
            recording.set()
            record_on.wait(5)
        add_chunks(index, chunks)

    a, b = small("a", chunk_size), small("b", chunk_size, 2)
    async with opened(cache) as tier, trio.open_nursery() as nursery:
        monkeypatch.setattr(Blob, "sync", slow_sync)
        monkeypatch.setattr(BlobIndex, "add_chunks", slow_add)
        async with tier.using(generation_of("a", a)) as blob_a, tier.using(generation_of("b", b)) as blob_b:
            await store(tier, blob_a, a, 0)
            await store(tier, blob_b, b, 0)
            nursery.start_soon(tier.run)
            await until(syncing.is_set)
            await store(tier, blob_b, b, 1)
            nursery.start_soon(tier.flush)
            await until(recording.is_set)
            sync_on.set()
            await trio.to_thread.run_sync(record_on.wait, 0.02)
            record_on.set()
        nursery.cancel_scope.cancel()
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another")
    monkeypatch.setattr("trimsfs.tiers.index.BOOT_ID", boot_id)
    async with opened(cache) as tier:
        assert await here(tier) == {"a": chunk_size, "b": 2 * chunk_size}


# Room


async def test_the_least_recently_used_blobs_make_room(cache: Path, chunk_size: int) -> None:
    async with opened(cache, budget=10 * chunk_size) as tier:
        for key in "abcde":
            await fill(tier, key, small(key, chunk_size, 2))
        async with tier.using(generation_of("a", small("a", chunk_size, 2))):
            pass
        await fill(tier, "f", small("f", chunk_size, 2))
        # Room for one chunk and the headroom of four: three blobs of two.
        assert await here(tier) == dict.fromkeys("aef", 2 * chunk_size)
        assert tier.statistics().used_bytes == 6 * chunk_size
        assert tier.statistics().evictions == 3
        assert tier.statistics().evicted_bytes == 6 * chunk_size
        assert len(blob_files(cache)) == 3


async def test_the_order_of_use_survives_a_restart(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        for key in "abc":
            await fill(tier, key, small(key, chunk_size, 3))
        async with tier.using(generation_of("a", small("a", chunk_size, 3))):
            pass
    async with opened(cache, budget=9 * chunk_size) as tier:
        await fill(tier, "d", small("d", chunk_size, 1))
        assert await here(tier) == {"a": 3 * chunk_size, "d": chunk_size}


async def test_blobs_in_use_and_pinned_ones_are_not_evicted(cache: Path, chunk_size: int) -> None:
    contents = {key: small(key, chunk_size, 2) for key in "abcd"}
    async with opened(cache, budget=6 * chunk_size) as tier:
        pinned = await fill(tier, "a", contents["a"])
        async with tier.using(pinned) as blob:
            await tier.pin(blob, True)
        await fill(tier, "b", contents["b"])
        await fill(tier, "c", contents["c"])
        async with tier.using(generation_of("b", contents["b"])) as in_use:
            await fill(tier, "d", contents["d"])
            assert await here(tier) == dict.fromkeys("abd", 2 * chunk_size)
            assert in_use.view(0, 2 * chunk_size) == contents["b"]


async def test_without_room_a_chunk_is_declined_and_nothing_evicted(cache: Path, chunk_size: int) -> None:
    """Evicting the little that may go would not make room."""
    a, b = small("a", chunk_size, 3.5), small("b", chunk_size, 3)
    async with opened(cache, budget=4 * chunk_size) as tier, tier.using(generation_of("a", a)) as in_use:
        assert await store(tier, in_use, a, 0, 1, 2, 3) == [True] * 4
        await fill(tier, "idle", small("idle", chunk_size, 0.25))
        async with tier.using(generation_of("b", b)) as other:
            assert await store(tier, other, b, 0) == [False]
            assert states(other) == [MISSING] * 3
            assert tier.full(generation_of("b", b))
        assert tier.statistics().evictions == 0
        assert tier.statistics().refused_chunks == 1
        assert tier.statistics().used_bytes == 3.75 * chunk_size == await recorded_bytes(tier)


async def test_room_is_not_looked_for_again_and_again(cache: Path, chunk_size: int, mock_clock: MockClock) -> None:
    a, b = small("a", chunk_size, 2), small("b", chunk_size, 2)
    async with opened(cache, budget=2 * chunk_size) as tier:
        holding = await tier.acquire(generation_of("a", a))
        await store(tier, holding, a, 0, 1)
        async with tier.using(generation_of("b", b)) as blob:
            assert await store(tier, blob, b, 0) == [False]
            assert tier.full(generation_of("b", b))
            mock_clock.jump(1.5)
            assert not tier.full(generation_of("b", b))
            assert await store(tier, blob, b, 0) == [False]
            assert tier.full(generation_of("b", b))
            tier.release(holding)
            assert not tier.full(generation_of("b", b))
            assert await store(tier, blob, b, 0) == [True]
        assert await here(tier) == {"b": chunk_size}


async def test_freed_room_is_used_at_once(cache: Path, chunk_size: int, mock_clock: MockClock) -> None:
    del mock_clock
    a, b = small("a", chunk_size, 2), small("b", chunk_size, 2)
    async with opened(cache, budget=2 * chunk_size) as tier:
        holding = await tier.acquire(generation_of("a", a))
        await store(tier, holding, a, 0, 1)
        async with tier.using(generation_of("b", b)) as blob:
            assert await store(tier, blob, b, 0) == [False]
            tier.release(holding)
            assert await tier.evict(holding.generation) == 2 * chunk_size
            assert await store(tier, blob, b, 0) == [True]


async def test_a_budget_of_nothing_keeps_nothing(cache: Path, chunk_size: int) -> None:
    a = small("a", chunk_size)
    async with opened(cache, budget=0) as tier, tier.using(generation_of("a", a)) as blob:
        assert await store(tier, blob, a, 0) == [False]
        assert tier.statistics().used_bytes == 0


async def test_free_space_on_the_file_system_is_left(cache: Path, chunk_size: int) -> None:
    a = small("a", chunk_size)
    async with opened(cache, min_free=1 << 60) as tier, tier.using(generation_of("a", a)) as blob:
        assert tier.free_bytes() == 0
        assert await store(tier, blob, a, 0) == [False]


async def test_free_bytes_are_what_the_budget_leaves(cache: Path, chunk_size: int) -> None:
    async with opened(cache, budget=10 * chunk_size) as tier:
        await fill(tier, "a", small("a", chunk_size, 3))
        assert tier.free_bytes() == 7 * chunk_size


async def test_a_budget_that_was_made_smaller_is_met_at_the_next_chunk(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        for number in range(20):
            await fill(tier, f"old{number}", small(f"old{number}", chunk_size))
    a = small("a", chunk_size)
    async with opened(cache, budget=8 * chunk_size) as tier, tier.using(generation_of("a", a)) as blob:
        assert await store(tier, blob, a, 0) == [True]
        assert tier.statistics().used_bytes <= 8 * chunk_size


async def test_chunks_stored_at_once_keep_to_the_budget(cache: Path, chunk_size: int) -> None:
    new = small("new", chunk_size, 10)
    async with opened(cache, budget=10 * chunk_size) as tier:
        for number in range(10):
            await fill(tier, f"old{number}", small(f"old{number}", chunk_size))
        async with tier.using(generation_of("new", new)) as blob, trio.open_nursery() as nursery:
            for chunk in range(8):
                nursery.start_soon(store, tier, blob, new, chunk)
        assert tier.statistics().used_bytes == await recorded_bytes(tier)
        assert await recorded_bytes(tier) <= 10 * chunk_size


async def test_chunks_stored_at_once_do_not_evict_more_than_they_need(cache: Path, chunk_size: int) -> None:
    new = small("new", chunk_size, 8)
    async with opened(cache, budget=100 * chunk_size) as tier:
        for number in range(100):
            await fill(tier, f"old{number}", small(f"old{number}", chunk_size))
        async with tier.using(generation_of("new", new)) as blob, trio.open_nursery() as nursery:
            for chunk in range(8):
                nursery.start_soon(store, tier, blob, new, chunk)
        # Eight are needed; the headroom is four, and may be searched for twice.
        assert tier.statistics().evictions <= 8 + 4 + 4


async def test_a_blob_evicted_by_two_commands_at_once_is_counted_once(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size, 2))
        await fill(tier, "b", small("b", chunk_size))
        freed: list[int] = []

        async def evict() -> None:
            freed.append(await tier.evict(generation))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(evict)
            nursery.start_soon(evict)
        assert tier.statistics().used_bytes == chunk_size
        assert sorted(freed) == [0, 2 * chunk_size]
        assert tier.statistics().evicted_bytes == 2 * chunk_size


async def test_a_blob_pinned_while_room_is_made_stays(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, go_on = threading.Event(), threading.Event()
    evictable = BlobIndex.evictable

    def choose(index: BlobIndex, store_url: str) -> list[Evictable]:
        entries = evictable(index, store_url)
        chosen.set()
        go_on.wait(5)
        return entries

    a, b = small("a", chunk_size, 2), small("b", chunk_size, 2)
    async with opened(cache, budget=2 * chunk_size) as tier:
        await fill(tier, "a", a)
        monkeypatch.setattr(BlobIndex, "evictable", choose)
        async with tier.using(generation_of("b", b)) as blob, trio.open_nursery() as nursery:
            nursery.start_soon(store, tier, blob, b, 0)
            await trio.to_thread.run_sync(chosen.wait)
            async with tier.using(generation_of("a", a)) as pinned:
                pinning = trio.Event()

                async def pin() -> None:
                    await tier.pin(pinned, True)
                    pinning.set()

                nursery.start_soon(pin)
                with trio.move_on_after(0.05):
                    # The index may be in use by the search, and then this waits for it.
                    await pinning.wait()
            go_on.set()
        assert (await tier.residency(generation_of("a", a))).disk_bytes == 2 * chunk_size


# A disk that fails


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
async def test_a_disk_that_turns_out_full_makes_room_and_is_tried_again(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    a, b = small("a", chunk_size, 2), small("b", chunk_size)
    async with opened(cache) as tier:
        await fill(tier, "a", a)
        writes = FailingWrites(monkeypatch, error, times=1)
        async with tier.using(generation_of("b", b)) as blob:
            assert await store(tier, blob, b, 0) == [True]
            assert blob.view(0, chunk_size) == b
        assert writes.calls == 2
        assert await here(tier) == {"b": chunk_size}
        assert tier.statistics().used_bytes == chunk_size


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS])
async def test_a_disk_that_cannot_be_written_declines(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    b = small("b", chunk_size)
    async with opened(cache) as tier:
        FailingWrites(monkeypatch, error)
        async with tier.using(generation_of("b", b)) as blob:
            assert await store(tier, blob, b, 0) == [False]
            assert states(blob) == [MISSING]
        assert tier.statistics().used_bytes == 0
        assert tier.statistics().refused_chunks == 1


async def test_a_disk_that_fails_otherwise_costs_no_other_model(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = small("b", chunk_size)
    async with opened(cache) as tier:
        await fill(tier, "a", small("a", chunk_size))
        FailingWrites(monkeypatch, errno.EIO)
        async with tier.using(generation_of("b", b)) as blob:
            assert await store(tier, blob, b, 0) == [False]
        assert await here(tier) == {"a": chunk_size}


async def test_a_disk_that_stays_full_is_full(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    del mock_clock
    b = small("b", chunk_size)
    async with opened(cache) as tier, tier.using(generation_of("b", b)) as blob:
        FailingWrites(monkeypatch, errno.ENOSPC)
        assert await store(tier, blob, b, 0) == [False]
        assert tier.full(generation_of("b", b))


async def test_a_real_full_disk_declines_and_serves_on(tmp_path: Path, chunk_size: int) -> None:
    size = 4 << 20
    content = content_of("a", 2 * size)
    with tmpfs(tmp_path / "disk", size) as cache:
        async with opened(cache) as tier, tier.using(generation_of("a", content)) as blob:
            kept = await store(tier, blob, content, *range(len(blob.states)))
            assert 0 < sum(kept) < len(kept)
            assert not kept[-1]
            start, stop = 0, sum(kept) * chunk_size
            assert kept == [True] * sum(kept) + [False] * (len(kept) - sum(kept))
            assert blob.readable(start, stop)
            assert blob.view(start, stop) == content[start:stop]
            assert tier.statistics().used_bytes == stop


@pytest.mark.parametrize("method", ["remove", "evictable"])
async def test_an_index_that_fails_while_room_is_made_declines(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    b = small("b", chunk_size)
    async with opened(cache, budget=chunk_size) as tier:
        await fill(tier, "a", small("a", chunk_size))
        monkeypatch.setattr(BlobIndex, method, fail)
        async with tier.using(generation_of("b", b)) as blob:
            assert await store(tier, blob, b, 0) == [False]


async def test_an_index_that_cannot_be_written_keeps_the_chunks_for_later(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    async with opened(cache) as tier:
        with monkeypatch.context() as patch:
            patch.setattr(BlobIndex, "add_chunks", fail)
            await fill(tier, "a", small("a", chunk_size))
            with caplog.at_level(logging.ERROR):
                await tier.flush()
            assert "cannot write the cache index: disk I/O error" in caplog.text
        assert await here(tier) == {"a": chunk_size}


async def test_a_pin_that_cannot_be_recorded_is_an_error_of_the_cache(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anything else would end the server that carries the command."""

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
        monkeypatch.setattr(BlobIndex, "set_pinned", fail)
        async with tier.using(generation) as blob:
            with pytest.raises(CacheError, match="database or disk is full"):
                await tier.pin(blob, True)
            assert not blob.pinned


async def test_a_cache_directory_that_is_removed_under_the_server_declines(cache: Path, chunk_size: int) -> None:
    a, b = small("a", chunk_size), small("b", chunk_size)
    async with opened(cache) as tier, tier.using(generation_of("a", a)) as before:
        shutil.rmtree(cache)
        assert await store(tier, before, a, 0) in ([True], [False])
        async with tier.using(generation_of("b", b)) as after:
            assert await store(tier, after, b, 0) == [False]


async def test_a_blob_without_a_file_is_served_without_being_kept(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    a = small("a", chunk_size)
    monkeypatch.setattr(Blob, "attach", fail)
    async with opened(cache) as tier, tier.using(generation_of("a", a)) as blob:
        assert not blob.attached
        assert await store(tier, blob, a, 0) == [False]
        assert tier.statistics().used_bytes == 0


async def test_a_blob_whose_file_could_not_be_made_is_tried_again_at_the_next_open(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    a = small("a", chunk_size)
    async with opened(cache) as tier:
        with monkeypatch.context() as patch:
            patch.setattr(Blob, "attach", fail)
            async with tier.using(generation_of("a", a)):
                pass
        async with tier.using(generation_of("a", a)) as blob:
            assert await store(tier, blob, a, 0) == [True]


async def test_evicting_a_blob_that_could_not_be_attached_frees_what_is_on_disk(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
    async with opened(cache) as tier:
        monkeypatch.setattr(Blob, "attach", fail)
        async with tier.using(generation):
            pass
        assert await tier.evict(generation) == chunk_size
        assert tier.statistics().used_bytes == 0 == await recorded_bytes(tier)


# Commands


async def test_eviction_removes_the_file_and_the_record(cache: Path, chunk_size: int) -> None:
    a = small("a", chunk_size, 2)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", a)
        assert await tier.evict(generation) == 2 * chunk_size
        assert await tier.evict(generation) == 0
        assert await tier.residencies() == []
        assert blob_files(cache) == []
        assert tier.statistics().used_bytes == 0
        async with tier.using(generation) as blob:
            assert states(blob) == [MISSING, MISSING]


async def test_eviction_of_what_an_earlier_server_left(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size, 2))
    async with opened(cache) as tier:
        assert await tier.evict(generation) == 2 * chunk_size
        assert tier.statistics().used_bytes == 0
        assert blob_files(cache) == []


async def test_what_is_open_or_pinned_is_not_evicted_by_command(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
        async with tier.using(generation) as blob:
            with pytest.raises(InUseError, match="a is in use: it can be evicted once it is closed"):
                await tier.evict(generation)
            await tier.pin(blob, True)
        with pytest.raises(InUseError, match="a is pinned: unpin it first"):
            await tier.evict(generation)
        async with tier.using(generation) as blob:
            await tier.pin(blob, False)
        assert await tier.evict(generation) == chunk_size


async def test_a_pin_survives_a_restart(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
        async with tier.using(generation) as blob:
            await tier.pin(blob, True)
    async with opened(cache) as tier:
        with pytest.raises(InUseError, match="pinned"):
            await tier.evict(generation)
        async with tier.using(generation) as blob:
            assert blob.pinned


async def test_an_eviction_that_is_cancelled_leaves_the_blob_or_removes_it(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
        with trio.CancelScope() as scope:
            detach = Blob.detach

            def cancel(blob: Blob) -> None:
                detach(blob)
                scope.cancel()

            monkeypatch.setattr(Blob, "detach", cancel)
            await tier.evict(generation)
        monkeypatch.undo()
        assert tier.statistics().used_bytes == await recorded_bytes(tier)
        if await recorded_bytes(tier) == 0:
            assert blob_files(cache) == []


async def test_residency_tells_what_is_here(cache: Path, chunk_size: int) -> None:
    content = small("a", chunk_size, 2)
    generation = generation_of("a", content)
    async with opened(cache) as tier:
        nothing = await tier.residency(generation)
        assert (nothing.disk_bytes, nothing.host_bytes, nothing.verified, nothing.users) == (0, 0, False, 0)
        async with tier.using(generation) as blob:
            await store(tier, blob, content, 0)
            half = await tier.residency(generation)
            assert (half.disk_bytes, half.verified, half.pinned, half.users) == (chunk_size, False, False, 1)
            assert half.host_bytes in {None, chunk_size}
            await store(tier, blob, content, 1)
            assert (await tier.residency(generation)).verified
        whole = await tier.residency(generation)
        assert (whole.disk_bytes, whole.users, whole.uses) == (2 * chunk_size, 0, 1)
        assert whole.generation == generation
        assert await tier.residencies() == [whole]


async def test_every_open_is_a_use(cache: Path, chunk_size: int) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
        for _ in range(4):
            async with tier.using(generation):
                pass
        assert (await tier.residency(generation)).uses == 5


async def test_only_this_stores_objects_are_listed(cache: Path, chunk_size: int) -> None:
    async with opened(cache, store="s3://one") as tier:
        await fill(tier, "a", small("a", chunk_size))
    async with opened(cache, store="s3://other") as tier:
        assert await tier.residencies() == []


async def test_pins_of_another_store_do_not_fill_the_cache_for_ever(cache: Path, chunk_size: int) -> None:
    async with opened(cache, store="s3://one") as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
        async with tier.using(generation) as blob:
            await tier.pin(blob, True)
    b = small("b", chunk_size)
    async with (
        opened(cache, store="s3://other", budget=chunk_size) as tier,
        tier.using(generation_of("b", b)) as blob,
    ):
        assert await store(tier, blob, b, 0) == [True]


async def test_a_store_whose_name_is_not_text_is_cached(cache: Path, chunk_size: int) -> None:
    a = small("a", chunk_size)
    async with opened(cache, store="file:///srv/\udcff") as tier, tier.using(generation_of("a", a)) as blob:
        assert await store(tier, blob, a, 0) == [True]


async def test_an_open_with_a_newer_version_of_the_same_content_takes_it_over(cache: Path, chunk_size: int) -> None:
    a = small("a", chunk_size)
    async with opened(cache) as tier:
        async with tier.using(generation_of("a", a, version_id="v1")):
            pass
        async with tier.using(generation_of("a", a, version_id="v2")) as blob:
            assert blob.generation.version_id == "v2"


# Open files


async def test_idle_blobs_are_closed_beyond_a_limit_and_found_again(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (32, 32))  # an eighth of which may be idle blobs
    contents = {f"k{number}": small(f"k{number}", chunk_size) for number in range(20)}
    before = len(os.listdir("/proc/self/fd"))
    async with opened(cache) as tier:
        for key, content in contents.items():
            await fill(tier, key, content)
        await tier.flush()
    async with opened(cache) as tier:
        for key, content in contents.items():
            async with tier.using(generation_of(key, content)):
                pass
        # The lock, three files of the index, and the blobs with a duplicate each, which Python makes for the mapping.
        assert len(os.listdir("/proc/self/fd")) <= before + 4 + 2 * 4
        for key, content in contents.items():
            async with tier.using(generation_of(key, content)) as blob:
                assert await verify_chunk(tier, blob, 0)
        assert tier.statistics().used_bytes == 20 * chunk_size == await recorded_bytes(tier)


async def test_a_blob_closed_right_after_it_was_written_keeps_its_chunks(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (16, 16))
    contents = {f"k{number}": small(f"k{number}", chunk_size) for number in range(10)}
    async with opened(cache) as tier:
        for key, content in contents.items():
            await fill(tier, key, content)
        for key, content in contents.items():
            async with tier.using(generation_of(key, content)) as blob:
                assert states(blob) != [MISSING]


async def test_closing_leaves_no_descriptor_open(cache: Path, chunk_size: int) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    async with opened(cache) as tier:
        await fill(tier, "a", small("a", chunk_size))
        await fill(tier, "b", small("b", chunk_size))
    assert sorted(os.listdir("/proc/self/fd")) == before
