"""The files of blobs that the server does not read are closed; what is known of the blobs stays, and holds."""

import gc
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.held import Held, begin
from tests.support.parts import blob_files, content_of, fill, flip_byte, generation_of, opened, states
from tests.unit.disk.common import MISSING, UNVERIFIED, VERIFIED, synced
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.types import Generation


@pytest.fixture
def content(chunk_size: int) -> bytes:
    return content_of("a", 2 * chunk_size + 100)


def close_files(tier: DiskTier) -> None:
    """Close the files of blobs as if too many were open."""
    tier._open_blobs._close_files(most=0, looks=1)


@asynccontextmanager
async def closed(cache: Path, content: bytes) -> AsyncIterator[tuple[DiskTier, Generation, Blob]]:
    """A tier with a whole blob whose file is closed."""
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
        await synced(tier)
        close_files(tier)
        blob = tier.blobs.known(tier.blobs.token(generation))
        assert blob is not None
        assert not blob.opened
        yield tier, generation, blob


@asynccontextmanager
async def passed(cache: Path, content: bytes) -> AsyncIterator[tuple[DiskTier, Blob, list[Blob]]]:
    """A tier with a blob that the kernel reads by itself and whose file is closed; what has been suspected of late."""
    suspected: list[Blob] = []
    async with opened(cache, suspected=lambda blob, _: suspected.append(blob)) as tier:
        generation = await fill(tier, "a", content)
        await synced(tier)
        async with tier.blobs.using(generation) as blob:
            blob.passed, blob.backing_id = 1, 7
            close_files(tier)
            assert not blob.opened
            yield tier, blob, suspected
            blob.passed = blob.backing_id = 0


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_blob_takes_one_descriptor_and_none_once_its_file_is_closed(cache: Path, content: bytes) -> None:
    async with opened(cache) as tier:
        gc.collect()
        before = descriptors()
        generation = await fill(tier, "a", content)
        async with tier.blobs.using(generation) as blob:
            view = blob.view(0, len(content))
            assert descriptors() == before + 1
        close_files(tier)
        assert descriptors() == before + 1, "not synced"
        await synced(tier)
        async with tier.blobs.using(generation):
            close_files(tier)
            assert descriptors() == before + 1, "in use"
        close_files(tier)
        assert descriptors() == before
        assert view == content


async def test_a_file_that_is_opened_again_is_the_same(cache: Path, content: bytes) -> None:
    async with closed(cache, content) as (tier, generation, known), tier.blobs.using(generation) as blob:
        assert blob is known
        assert blob.view(0, len(content)) == content
        assert states(blob) == [VERIFIED] * 3


async def test_a_file_that_the_kernel_reads_by_itself_is_not_opened_again(cache: Path, content: bytes) -> None:
    async with passed(cache, content) as (tier, blob, _), tier.blobs.using(blob.generation) as same:
        assert same is blob
        assert not blob.opened, "the kernel needs no descriptor of the server"


@pytest.mark.parametrize("in_use", [True, False])
async def test_a_truncation_of_what_the_kernel_reads_is_told(cache: Path, content: bytes, in_use: bool) -> None:
    async with passed(cache, content) as (tier, known, suspected):
        if not in_use:
            known.passed = 0
            tier.blobs.release(known)
        os.truncate(blob_files(cache)[0], 100)
        async with tier.blobs.using(known.generation) as blob:
            assert suspected == [known] * in_use
            assert (blob is known) is in_use
            assert states(blob) == [VERIFIED if in_use else MISSING] * 3
            assert in_use or (os.fstat(blob.fileno()).st_size, tier.statistics().used_bytes) == (len(content), 0)
        known.users += not in_use  # the block releases it


def replace(path: Path) -> None:
    shutil.copy(path, f"{path}-copy")
    os.replace(f"{path}-copy", path)


def replace_and_damage(path: Path) -> None:
    replace(path)
    flip_byte(path, 5)


@pytest.mark.parametrize(
    ("meddle", "state"),
    [
        (Path.touch, UNVERIFIED),
        (replace, UNVERIFIED),
        (replace_and_damage, UNVERIFIED),
        (lambda path: flip_byte(path, 5), UNVERIFIED),
        (Path.unlink, MISSING),
        (lambda path: shutil.rmtree(path.parent), MISSING),
        (lambda path: os.truncate(path, 100), MISSING),
    ],
)
async def test_what_was_changed_while_it_was_closed_has_to_pass_its_checksums_or_is_missing(
    cache: Path, content: bytes, meddle: Callable[[Path], None], state: int
) -> None:
    async with closed(cache, content) as (tier, generation, _):
        meddle(blob_files(cache)[0])
        async with tier.blobs.using(generation) as blob:
            assert states(blob) == [state] * 3
            assert blob.attached
        assert tier.statistics().used_bytes == (0 if state == MISSING else len(content))


@pytest.mark.parametrize("meddle", [Path.unlink, replace])
async def test_another_file_is_not_taken_for_one_that_is_in_use(
    cache: Path, content: bytes, meddle: Callable[[Path], None]
) -> None:
    async with closed(cache, content) as (_, _, blob):
        meddle(blob_files(cache)[0])
        with pytest.raises(OSError, match=r"replaced|No such file"):
            blob.fileno()


async def test_beyond_the_limit_known_blobs_are_served_uncached_and_no_descriptor_is_taken(
    cache: Path, content: bytes
) -> None:
    async with closed(cache, content) as (tier, generation, blob):
        tier._state.open_files.most = 0
        blob.users += 1  # it is in use already, as one that the kernel reads
        before = descriptors()
        assert blob.view(5, 100) == content[5:100]
        assert descriptors() == before
        blob.users -= 1
        async with tier.blobs.using(generation) as other:
            assert not other.attached


async def test_a_blob_is_forgotten_beyond_the_number_that_is_known(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.tiers.disk.open_blobs.MOST_KNOWN", 5)
    async with opened(cache) as tier:
        generations = [await fill(tier, f"k{number}", content_of(f"k{number}", chunk_size)) for number in range(10)]
        await synced(tier)
        for generation in generations:
            async with tier.blobs.using(generation):
                pass
        known = [tier.blobs.known(tier.blobs.token(generation)) is not None for generation in generations]
        assert known == [False] * 5 + [True] * 5


async def test_a_file_that_a_thread_looks_at_is_not_closed_meanwhile(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number would be that of another file by then."""
    async with opened(cache) as tier:
        tier._open_blobs._most_idle = 0
        attaching = Held(monkeypatch, Blob, "attach", after=True)
        async with trio.open_nursery() as nursery:
            acquired = begin(nursery, tier.blobs.acquire, generation_of("a", b"content"))
            await attaching.reached()
            tier._open_blobs.close_idle()
            attaching.go.set()
        (blob,) = acquired
        assert blob.opened
        assert os.fstat(blob.fileno()).st_size == len(b"content")


async def test_a_directory_that_somebody_has_removed_is_not_made_anew(cache: Path) -> None:
    """That it is gone would not be noticed."""
    async with opened(cache) as tier:
        shutil.rmtree(cache / "blobs")
        (blob,) = await tier.blobs.recall([generation_of("a", b"content")])
        assert not blob.attached
        async with tier.blobs.using(generation_of("b", b"content")) as blob:
            assert not blob.attached
        assert not (cache / "blobs").exists()


async def test_a_blob_that_is_forgotten_while_it_is_recalled_is_given_all_the_same(
    cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with closed(cache, content) as (tier, generation, known):
        loading = Held(monkeypatch, tier._state.files, "load_all")
        async with trio.open_nursery() as nursery:
            recalled = begin(nursery, tier.blobs.recall, [generation])
            await wait_all_tasks_blocked()
            tier._open_blobs._forget(most=0, looks=1)
            assert tier.blobs.known(known.token) is None
            loading.go.set()
        assert recalled == [[known]]
