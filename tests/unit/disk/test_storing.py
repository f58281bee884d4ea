"""What is stored on the disk is found again, by whoever may use the directory."""

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from tests.support.held import Held, begin
from tests.support.parts import (
    blob_files,
    disk_tier,
    fill,
    flip_byte,
    generation_of,
    opened,
    recorded_bytes,
    states,
    until,
    verify_chunk,
)
from tests.unit.disk.common import MISSING, UNVERIFIED, VERIFIED, here, left, remove_index, small, store
from trimsfs.errors import CacheInUseError, CacheUnusableError
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.index.index import BlobIndex

Reboot = Callable[[], object]


def put_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


# The directory


async def test_a_second_server_may_not_use_the_directory(cache: Path) -> None:
    async with opened(cache):
        with pytest.raises(CacheInUseError, match=rf"{cache} is in use .* pid {os.getpid()} \(.+\): unmount"):
            disk_tier(cache, store="other")
    async with opened(cache):
        pass


async def test_the_directory_is_made_private(tmp_path: Path) -> None:
    async with opened(tmp_path / "a/b/cache"):
        assert (tmp_path / "a/b/cache").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("below", "message"), [("file/cache", "Not a directory: set --cache-dir"), ("file", "")])
def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path, below: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheUnusableError, match=rf"cache directory {tmp_path / below}: {message}"):
        disk_tier(tmp_path / below, store="s")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_directory_that_may_not_be_written_is_reported() -> None:
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        os.seteuid(65534)
        try:
            with pytest.raises(CacheUnusableError, match=r"cache directory .*: Permission denied: set --cache-dir"):
                disk_tier(Path(directory), store="s")
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("in_the_way", ["blobs", "index.sqlite/file"])
async def test_a_tier_that_cannot_be_opened_gives_up_the_lock(cache: Path, in_the_way: str) -> None:
    """There is a file where a directory should be, or the other way round."""
    put_file(cache / in_the_way)
    with pytest.raises(CacheUnusableError):
        disk_tier(cache, store="s")
    os.unlink(cache / in_the_way)
    if "/" in in_the_way:
        os.rmdir(cache / "index.sqlite")
    async with opened(cache):
        pass


# Storing and finding again


async def test_chunks_are_served_and_counted_and_come_back_unverified_after_a_restart(
    cache: Path, chunk_size: int
) -> None:
    content = small("a", chunk_size, 2.5)
    size = len(content) - chunk_size
    async with opened(cache) as tier, tier.blobs.using(generation_of("a", content)) as blob:
        assert await store(tier, blob, content, 1, 2) == [True, True]
        assert states(blob) == [MISSING, VERIFIED, VERIFIED]
        assert blob.view(chunk_size, len(content)) == content[chunk_size:]
        assert tier.statistics().used_bytes == size
        assert await here(tier) == {"a": size}
    async with opened(cache) as tier:
        assert tier.statistics().used_bytes == size
        async with tier.blobs.using(generation_of("a", content)) as blob:
            assert states(blob) == [MISSING, UNVERIFIED, UNVERIFIED]
            assert await verify_chunk(tier, blob, 1)
            assert await verify_chunk(tier, blob, 2)
            assert states(blob) == [MISSING, VERIFIED, VERIFIED]
            assert blob.view(chunk_size, len(content)) == content[chunk_size:]
            assert tier.statistics().used_bytes == size
            assert tier.statistics().corrupt_chunks == 0


async def test_an_empty_object_takes_no_place(cache: Path) -> None:
    async with opened(cache) as tier, tier.blobs.using(generation_of("a", b"")) as blob:
        assert blob.complete
        assert blob_files(cache) == []


async def test_the_same_generation_is_the_same_blob_and_another_content_another(cache: Path) -> None:
    generation = generation_of("a", b"content")
    async with opened(cache) as tier:
        async with trio.open_nursery() as nursery:
            acquired = [begin(nursery, tier.blobs.acquire, generation) for _ in range(10)]
        blobs = [blob for (blob,) in acquired]
        assert len({id(blob) for blob in blobs}) == 1
        assert blobs[0].users == 10
        assert tier.statistics().open_blobs == 1
        async with tier.blobs.using(generation_of("a", b"two")) as two:
            assert two is not blobs[0]
        assert len(blob_files(cache)) == 2
        for blob in blobs:
            tier.blobs.release(blob)
        assert tier.statistics().open_blobs == 0


async def test_chunks_survive_a_server_that_is_killed(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.tiers.index.journal.COMPARISON_PATIENCE_S", 0.1)  # nobody compares them
    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size, 2))
        await tier.journal.flush()
        kept = left(cache)
    async with opened(kept) as tier, tier.blobs.using(generation) as blob:
        assert states(blob) == [UNVERIFIED, UNVERIFIED]
        assert await verify_chunk(tier, blob, 1)


async def test_chunks_that_were_not_synced_do_not_survive_a_boot(cache: Path, chunk_size: int, reboot: Reboot) -> None:
    async with opened(cache) as tier:
        await fill(tier, "a", small("a", chunk_size))
    async with opened(cache) as tier:
        await fill(tier, "b", small("b", chunk_size))
        await tier.journal.flush()
        kept = left(cache)
    reboot()
    async with opened(kept) as tier:
        assert await here(tier) == {"a": chunk_size}
        assert tier.statistics().used_bytes == chunk_size


async def test_a_flipped_byte_makes_the_chunk_missing(cache: Path, chunk_size: int) -> None:
    content = small("a", chunk_size, 2.5)
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
    flip_byte(blob_files(cache)[0], chunk_size + 5)
    async with opened(cache) as tier, tier.blobs.using(generation) as blob:
        assert not await verify_chunk(tier, blob, 1)
        assert states(blob) == [UNVERIFIED, MISSING, UNVERIFIED]
        assert tier.statistics().corrupt_chunks == 1
        assert tier.statistics().used_bytes == len(content) - chunk_size == await recorded_bytes(tier)
        assert await store(tier, blob, content, 1) == [True]
        assert tier.statistics().used_bytes == len(content) == await recorded_bytes(tier)


async def test_a_chunk_that_cannot_be_read_is_missing(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    async with opened(cache) as tier:
        generation = await fill(tier, "a", small("a", chunk_size))
    async with opened(cache) as tier, tier.blobs.using(generation) as blob:
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
        path = tier.files.path(tier.blobs.token(generation))
    damage(path)
    async with opened(cache) as tier, tier.blobs.using(generation) as blob:
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
        async with tier.blobs.using(generation) as blob:
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


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tier records and syncs at once."""
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.FLUSH_INTERVAL_S", 0.001)
    monkeypatch.setattr("trimsfs.tiers.disk.maintenance.SYNC_INTERVAL_S", 0.0)


@pytest.mark.usefixtures("hurried")
async def test_a_running_tier_records_what_is_written_and_syncs_it(
    cache: Path, chunk_size: int, reboot: Reboot, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        kept = left(cache)
        nursery.cancel_scope.cancel()
    reboot()
    async with opened(kept) as tier:
        assert await here(tier) == {"a": chunk_size}


@pytest.mark.usefixtures("hurried")
async def test_a_chunk_that_is_being_recorded_while_its_blob_is_synced_is_synced_later(
    cache: Path, chunk_size: int, reboot: Reboot, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = small("a", chunk_size), small("b", chunk_size, 2)
    async with opened(cache) as tier, trio.open_nursery() as nursery:
        async with tier.blobs.using(generation_of("a", a)) as blob_a, tier.blobs.using(generation_of("b", b)) as blob_b:
            await store(tier, blob_a, a, 0)
            await store(tier, blob_b, b, 0)
            syncing = Held(monkeypatch, Blob, "sync", times=1)  # of a, which is the first
            nursery.start_soon(tier.run)
            await syncing.reached()
            recording = Held(monkeypatch, BlobIndex, "add_chunks", times=1)
            await store(tier, blob_b, b, 1)
            nursery.start_soon(tier.journal.flush)
            await recording.reached()
            syncing.go.set()
            await trio.sleep(0.02)
            recording.go.set()
        nursery.cancel_scope.cancel()
    reboot()
    async with opened(cache) as tier:
        assert await here(tier) == {"a": chunk_size, "b": 2 * chunk_size}
