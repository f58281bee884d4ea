"""The files of blobs that the server does not read are closed; what is known of the blobs stays, and holds."""

import gc
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.parts import blob_files, content_of, fill, flip_byte, generation_of, opened, states, until
from tests.unit.disk.common import MISSING, UNVERIFIED, VERIFIED
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.types import Generation


@pytest.fixture
def content(chunk_size: int) -> bytes:
    return content_of("a", 2 * chunk_size + 100)


@asynccontextmanager
async def closed(cache: Path, content: bytes) -> AsyncIterator[tuple[DiskTier, Generation, Blob]]:
    """A tier with a whole blob whose file is closed."""
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
        await tier.flush()
        await tier._journal.sync()
        tier._open_blobs._close_files(most=0, looks=1)
        blob = tier.known(generation.token(tier.store))
        assert blob is not None
        assert not blob.opened
        yield tier, generation, blob


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def test_a_blob_takes_one_descriptor_and_none_once_its_file_is_closed(cache: Path, content: bytes) -> None:
    async with opened(cache) as tier:
        gc.collect()
        before = descriptors()
        generation = await fill(tier, "a", content)
        async with tier.using(generation) as blob:
            view = blob.view(0, len(content))
            assert descriptors() == before + 1
        await tier.flush()
        await tier._journal.sync()
        tier._open_blobs._close_files(most=0, looks=1)
        assert descriptors() == before
        assert view == content


async def test_a_file_that_is_opened_again_is_the_same(cache: Path, content: bytes) -> None:
    async with closed(cache, content) as (tier, generation, known), tier.using(generation) as blob:
        assert blob is known
        assert blob.view(0, len(content)) == content
        assert states(blob) == [VERIFIED] * 3


async def test_a_file_that_is_not_synced_or_in_use_stays_open(cache: Path, content: bytes) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
        tier._open_blobs._close_files(most=0, looks=1)
        assert len(tier._state.open_files) == 1
        await tier.flush()
        await tier._journal.sync()
        async with tier.using(generation):
            tier._open_blobs._close_files(most=0, looks=1)
            assert len(tier._state.open_files) == 1
        tier._open_blobs._close_files(most=0, looks=1)
        assert len(tier._state.open_files) == 0


async def test_a_file_that_the_kernel_reads_by_itself_may_be_closed_while_it_is_in_use(
    cache: Path, content: bytes
) -> None:
    async with opened(cache) as tier:
        generation = await fill(tier, "a", content)
        await tier.flush()
        await tier._journal.sync()
        async with tier.using(generation) as blob:
            blob.passed, blob.backing_id = 1, 7
            tier._open_blobs._close_files(most=0, looks=1)
            assert not blob.opened
            assert await tier.acquire(generation) is blob
            assert not blob.opened, "the kernel needs no descriptor of the server"
            tier.release(blob)
            blob.passed = blob.backing_id = 0


async def test_what_was_truncated_while_it_was_closed_is_missing(cache: Path, content: bytes) -> None:
    async with closed(cache, content) as (tier, generation, _):
        os.truncate(blob_files(cache)[0], 100)
        async with tier.using(generation) as blob:
            assert states(blob) == [MISSING] * 3
            assert blob.surplus == 0
        assert tier.statistics().used_bytes == 0


@pytest.mark.parametrize("in_use", [True, False])
async def test_a_truncation_of_what_the_kernel_reads_is_told(cache: Path, content: bytes, in_use: bool) -> None:
    suspected: list[Blob] = []
    async with opened(cache, suspected=lambda blob, _: suspected.append(blob)) as tier:
        generation = await fill(tier, "a", content)
        await tier.flush()
        await tier._journal.sync()
        known = await tier.acquire(generation)
        known.passed, known.backing_id = 1, 7
        tier._open_blobs._close_files(most=0, looks=1)
        if not in_use:
            known.passed = 0
            tier.release(known)
        os.truncate(blob_files(cache)[0], 100)
        async with tier.using(generation) as blob:
            assert suspected == [known] * in_use
            assert (blob is known) is in_use
            assert states(blob) == [VERIFIED if in_use else MISSING] * 3
        if in_use:
            known.passed = 0
            tier.release(known)


def replace(path: Path) -> None:
    shutil.copy(path, f"{path}-copy")
    os.replace(f"{path}-copy", path)


def replace_and_damage(path: Path) -> None:
    replace(path)
    flip_byte(path, 5)


@pytest.mark.parametrize("meddle", [Path.touch, replace, replace_and_damage, lambda path: flip_byte(path, 5)])
async def test_what_may_have_been_changed_while_it_was_closed_has_to_pass_its_checksums(
    cache: Path, content: bytes, meddle: Callable[[Path], None]
) -> None:
    async with closed(cache, content) as (tier, generation, _):
        meddle(blob_files(cache)[0])
        async with tier.using(generation) as blob:
            assert states(blob) == [UNVERIFIED] * 3


@pytest.mark.parametrize("meddle", [Path.unlink, lambda path: shutil.rmtree(path.parent)])
async def test_what_was_removed_while_it_was_closed_is_missing(
    cache: Path, content: bytes, meddle: Callable[[Path], None]
) -> None:
    async with closed(cache, content) as (tier, generation, _):
        meddle(blob_files(cache)[0])
        async with tier.using(generation) as blob:
            assert states(blob) == [MISSING] * 3
            assert blob.attached
        assert tier.statistics().used_bytes == 0


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
        async with tier.using(generation) as other:
            assert not other.attached


async def test_a_blob_is_forgotten_beyond_the_number_that_is_known(
    cache: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.tiers.disk.open_blobs.MOST_KNOWN", 5)
    async with opened(cache) as tier:
        generations = [await fill(tier, f"k{number}", content_of(f"k{number}", chunk_size)) for number in range(10)]
        await tier.flush()
        await tier._journal.sync()
        for generation in generations:
            async with tier.using(generation):
                pass
        assert [tier.known(generation.token(tier.store)) is not None for generation in generations] == [False] * 5 + [
            True
        ] * 5


async def test_a_file_that_a_thread_looks_at_is_not_closed_meanwhile(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its number would be that of another file by then."""
    looked_at, seen = threading.Event(), threading.Event()
    attach = Blob.attach

    def slow_attach(blob: Blob, path: Path, *, new: bool = False, keep_open: bool = True) -> bool:
        found = attach(blob, path, new=new, keep_open=keep_open)
        if blob.generation.key == "slow":
            looked_at.set()
            seen.wait(10)
        return found

    monkeypatch.setattr(Blob, "attach", slow_attach)
    async with opened(cache) as tier:
        tier._open_blobs._most_idle = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tier.acquire, generation_of("slow", b"content"))
            await until(looked_at.is_set)
            tier._open_blobs.close_idle()
            seen.set()
        (blob,) = [blob for blob in tier._state.blobs.values() if blob.generation.key == "slow"]
        assert blob.opened
        assert os.fstat(blob.fileno()).st_size == len(b"content")


async def test_a_directory_that_somebody_has_removed_is_not_made_anew(cache: Path) -> None:
    """That it is gone would not be noticed."""
    async with opened(cache) as tier:
        shutil.rmtree(cache / "blobs")
        (blob,) = await tier.recall([generation_of("a", b"content")])
        assert not blob.attached
        async with tier.using(generation_of("b", b"content")) as blob:
            assert not blob.attached
        assert not (cache / "blobs").exists()


async def test_a_blob_that_is_forgotten_while_it_is_recalled_is_given_all_the_same(
    cache: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with closed(cache, content) as (tier, generation, known):
        gate, recalled, load_all = threading.Event(), list[Blob](), tier._state.files.load_all

        def late(*arguments: object) -> object:
            gate.wait(10)
            return load_all(*arguments)  # type: ignore[arg-type]

        async def recall() -> None:
            recalled.extend(await tier.recall([generation]))

        monkeypatch.setattr(tier._state.files, "load_all", late)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(recall)
            await wait_all_tasks_blocked()
            tier._open_blobs._forget(most=0, looks=1)
            assert tier.known(known.token) is None
            gate.set()
        assert recalled == [known]
