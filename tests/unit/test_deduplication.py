"""Deduplication on real file systems that share blocks: XFS and btrfs."""

import logging
import random
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.benchmarks.sharing import Content
from tests.support.images import image_of
from tests.support.model_files import Array, safetensors
from tests.support.parts import content_of, fill, generation_of, opened, until
from trimsfs.tiers import deduplication
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.deduplication import Deduplication
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.tiers.extents import BLOCK, LEAST_SHARED, SharedExtent, can_share, share, shared_extents
from trimsfs.tiers.host import page_cache
from trimsfs.types import CHUNK_SIZE, Generation

MIB = 1 << 20
SIZE = 2 * CHUNK_SIZE + 5 * MIB + 12345


@pytest.fixture(params=["xfs", "btrfs"])
def cache(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    with image_of(request.param, tmp_path) as directory:
        yield directory / "cache"


@pytest.fixture
def disk(cache: Path) -> Path:
    """A directory on a file system that can share blocks."""
    cache.mkdir()
    return cache


@pytest.fixture
async def tier(cache: Path) -> AsyncIterator[DiskTier]:
    async with opened(cache, chunk_size=CHUNK_SIZE) as tier:
        yield tier


@lru_cache(maxsize=2)
def base(size: int) -> bytes:
    return content_of("base", size)


def model(key: str, *trained: int, size: int = SIZE) -> bytes:
    """A model, and a variant of it, of which these bytes are others."""
    content = bytearray(base(size))
    for offset in trained:
        content[offset] ^= 0xFF
    return bytes(content)


def deduplicating(tier: DiskTier) -> Deduplication:
    return Deduplication(tier.directory, tier.blobs, tier.files, tier.index, chunk_size=tier.chunk_size)


def of(tier: DiskTier, generation: Generation) -> Path:
    return tier.files.path(tier.blobs.token(generation))


def in_common(one: Path, other: Path) -> list[SharedExtent]:
    with one.open("rb") as file, other.open("rb") as another:
        return shared_extents(file.fileno(), another.fileno(), length=one.stat().st_size)


def common_bytes(one: Path, other: Path) -> int:
    return sum(part.length for part in in_common(one, other))


@asynccontextmanager
async def running(tier: DiskTier) -> AsyncIterator[Deduplication]:
    """Deduplication, for the length of the block."""
    async with trio.open_nursery() as nursery:
        component = deduplicating(tier)
        nursery.start_soon(component.run)
        await tier.journal.flush()
        yield component
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def at_work(tier: DiskTier) -> AsyncIterator[Deduplication]:
    """The same, once it has had a look at all that is idle."""
    async with running(tier) as component:
        await settled(tier)
        yield component


async def settled(tier: DiskTier) -> None:
    """Return when all that is whole has been compared."""
    await until(lambda: not tier.index.uncompared(deduplication.LEAST_BYTES))


async def waiting(component: Deduplication) -> None:
    """Return when a blob waits until nobody uses it."""
    await until(lambda: len(component._to_be_idle) == 1)


# Extents


@contextmanager
def two_files(disk: Path, content: bytes, changed: bytes) -> Iterator[tuple[int, int]]:
    """Descriptors of two files, whose bytes stay as they are."""
    one, other = disk / "one", disk / "other"
    one.write_bytes(content)
    other.write_bytes(changed)
    with one.open("r+b") as file, other.open("r+b") as another:
        yield file.fileno(), another.fileno()
    assert (one.read_bytes(), other.read_bytes()) == (content, changed)


def test_equal_files_share_all_their_blocks(disk: Path) -> None:
    size = 3 * MIB + 5
    with two_files(disk, content_of("a", size), content_of("a", size)) as (one, other):
        assert shared_extents(one, other, length=size) == []
        assert share(one, 0, other, 0, size) == size
        assert shared_extents(other, one, length=size) == [SharedExtent(0, 0, size)]


def test_ranges_at_different_places_can_be_shared(disk: Path) -> None:
    content = content_of("a", 4 * MIB)
    with two_files(disk, content, bytes(MIB) + content[:MIB]) as (one, other):
        assert share(one, 0, other, MIB, MIB) == MIB
        assert shared_extents(other, one, length=2 * MIB) == [SharedExtent(MIB, 0, MIB)]
        assert shared_extents(other, one, offset=MIB + LEAST_SHARED, at=LEAST_SHARED, length=LEAST_SHARED) == [
            SharedExtent(MIB + LEAST_SHARED, LEAST_SHARED, LEAST_SHARED)
        ]
        assert shared_extents(other, one, length=MIB) == []


@pytest.mark.parametrize("seed", range(5))
def test_equal_parts_are_shared_and_no_byte_changes(disk: Path, seed: int) -> None:
    """Some bytes differ: all parts of the least size without one are shared."""
    numbers = random.Random(seed)
    size = numbers.randrange(LEAST_SHARED, 3 * MIB)
    content = content_of("a", size)
    changed = bytearray(content)
    for _ in range(numbers.randrange(6)):
        changed[numbers.randrange(size)] ^= 1
    parts = [slice(start, start + LEAST_SHARED) for start in range(0, size, LEAST_SHARED)]
    equal = sum(len(content[part]) for part in parts if content[part] == changed[part])
    with two_files(disk, content, bytes(changed)) as (one, other):
        assert share(one, 0, other, 0, size) == equal
        assert sum(part.length for part in shared_extents(other, one, length=size)) == equal


def test_what_can_share_says_so(disk: Path) -> None:
    assert can_share(disk)
    assert list(disk.iterdir()) == []
    assert not can_share(Path("/dev/shm"))


# Blobs


async def test_chunks_that_are_alike_are_shared(tier: DiskTier, autojump_clock: MockClock) -> None:
    base, tuned = model("base"), model("tuned", SIZE - 1)
    one, other = await fill(tier, "base", base), await fill(tier, "tuned", tuned)
    assert common_bytes(of(tier, one), of(tier, other)) == 0
    async with at_work(tier) as component:
        alike = common_bytes(of(tier, one), of(tier, other))
        assert SIZE - LEAST_SHARED <= alike < SIZE
        assert component.statistics().shared_bytes == alike
    assert of(tier, one).read_bytes() == base
    assert of(tier, other).read_bytes() == tuned


async def test_a_chunk_is_found_at_another_place_of_a_file_of_another_size(
    tier: DiskTier, autojump_clock: MockClock
) -> None:
    base = model("base")
    moved = content_of("other", CHUNK_SIZE) + base[:CHUNK_SIZE]
    one, other = await fill(tier, "base", base), await fill(tier, "moved", moved)
    async with at_work(tier):
        assert in_common(of(tier, other), of(tier, one)) == [SharedExtent(CHUNK_SIZE, 0, CHUNK_SIZE)]
    assert of(tier, other).read_bytes() == moved


async def test_parts_of_chunks_are_shared_where_every_chunk_differs(tier: DiskTier, autojump_clock: MockClock) -> None:
    base, tuned = model("base"), model("tuned", 0, CHUNK_SIZE + 3 * MIB, 2 * CHUNK_SIZE)
    one, other = await fill(tier, "base", base), await fill(tier, "tuned", tuned)
    async with at_work(tier):
        assert common_bytes(of(tier, one), of(tier, other)) == SIZE - 3 * LEAST_SHARED
    assert of(tier, other).read_bytes() == tuned


async def test_models_of_one_size_that_are_strangers_are_left_as_they_are(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    compared: list[int] = []
    step = deduplication._share_step

    def counted(source: Path, at: int, target: Path, start: int) -> tuple[int, int]:
        compared.append(start)
        return step(source, at, target, start)

    monkeypatch.setattr(deduplication, "_share_step", counted)
    one, other = await fill(tier, "a", content_of("a", SIZE)), await fill(tier, "b", content_of("b", SIZE))
    async with at_work(tier) as component:
        assert component.statistics().shared_bytes == 0
    assert common_bytes(of(tier, one), of(tier, other)) == 0
    assert max(compared) < deduplication.PROBES * CHUNK_SIZE


async def test_bytes_that_differ_are_not_shared_whatever_their_checksum(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr("tests.support.parts.crc32c.crc32c", lambda _data: 42)
    contents = {key: content_of(key, CHUNK_SIZE) for key in ("a", "b")}
    generations = [await fill(tier, key, content) for key, content in contents.items()]
    async with at_work(tier) as component:
        assert component.statistics().shared_bytes == 0
    assert [of(tier, generation).read_bytes() for generation in generations] == list(contents.values())


async def test_many_variants_have_their_common_bytes_once(cache: Path, autojump_clock: MockClock) -> None:
    """Whichever come first, and those that are there when the server starts."""
    keys = [f"variant{number}" for number in range(5)]
    async with opened(cache, chunk_size=CHUNK_SIZE) as tier:
        generations = {key: await fill(tier, key, model(key, SIZE - 1 - MIB * n)) for n, key in enumerate(keys[:3])}
        async with at_work(tier):
            pass
    async with opened(cache, chunk_size=CHUNK_SIZE) as tier:
        generations |= {key: await fill(tier, key, model(key, SIZE - 1 - MIB * n)) for n, key in enumerate(keys[3:], 3)}
        async with at_work(tier):
            first, *others = (of(tier, generation) for generation in generations.values())
            for other in others:
                assert common_bytes(first, other) >= 2 * CHUNK_SIZE
        for n, key in enumerate(keys):
            assert of(tier, generations[key]).read_bytes() == model(key, SIZE - 1 - MIB * n)


@pytest.mark.parametrize("pinned", [False, True])
async def test_a_blob_in_use_is_left_alone_until_it_is_idle(
    tier: DiskTier, pinned: bool, autojump_clock: MockClock
) -> None:
    content = model("base")
    generations = [await fill(tier, key, content) for key in ("a", "b")]
    blobs = [await tier.blobs.acquire(generation) for generation in generations]
    if pinned:
        for blob in blobs:
            await tier.residencies.pin(blob, True)
            tier.blobs.release(blob)
    one, other = (of(tier, generation) for generation in generations)
    async with running(tier) as component:
        await waiting(component)
        assert component.statistics().waiting_blobs == 1
        assert common_bytes(one, other) == 0
        for blob in blobs:
            if pinned:
                await tier.residencies.pin(blob, False)
            else:
                tier.blobs.release(blob)
        await settled(tier)
        assert common_bytes(one, other) == SIZE


async def test_a_blob_that_comes_into_use_meanwhile_is_gone_on_with_later(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    content = model("base")
    used: list[Blob] = []
    generations = [await fill(tier, key, content) for key in ("a", "b")]
    step = deduplication._share_step

    def interrupting(source: Path, at: int, target: Path, start: int) -> tuple[int, int]:
        if start == CHUNK_SIZE and not used:
            blob = tier.blobs.known(target.name)
            assert blob is not None
            blob.users += 1
            used.append(blob)
        return step(source, at, target, start)

    monkeypatch.setattr(deduplication, "_share_step", interrupting)
    one, other = (of(tier, generation) for generation in generations)
    async with running(tier) as component:
        await waiting(component)
        assert used
        assert common_bytes(one, other) == CHUNK_SIZE + deduplication.STEP
        tier.blobs.release(used[0])
        await settled(tier)
    assert common_bytes(one, other) == component.statistics().shared_bytes == SIZE


async def test_what_was_in_memory_stays_there_and_nothing_else_comes(tier: DiskTier, autojump_clock: MockClock) -> None:
    content = model("base")
    paths = [of(tier, await fill(tier, key, content)) for key in ("a", "b", "c")]
    if _resident(paths[0]) is None:
        pytest.skip("needs Linux 6.5")
    with paths[1].open("rb") as file:
        page_cache.drop(file.fileno())
    before = [_resident(path) for path in paths]
    assert before[1] == 0
    async with at_work(tier) as component:
        assert component.statistics().shared_bytes == 2 * SIZE
    assert [_resident(path) for path in paths] == before


def _resident(path: Path) -> int | None:
    with path.open("rb") as file:
        return page_cache.resident_bytes(file.fileno())


async def test_what_is_evicted_takes_nothing_from_the_others(tier: DiskTier, autojump_clock: MockClock) -> None:
    """What comes again is compared again."""
    content = model("base")
    one, other = [await fill(tier, key, content) for key in ("a", "b")]
    async with at_work(tier):
        assert await tier.residencies.evict(one) == SIZE
        assert of(tier, other).read_bytes() == content
        await fill(tier, "a", content)
        await tier.journal.flush()
        assert common_bytes(of(tier, one), of(tier, other)) == 0
        await settled(tier)
        assert common_bytes(of(tier, one), of(tier, other)) == SIZE
        assert await tier.residencies.evict(other) == SIZE
    assert of(tier, one).read_bytes() == content


async def test_what_was_compared_is_not_compared_by_the_next_server(
    cache: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with opened(cache, chunk_size=CHUNK_SIZE) as tier:
        for key in ("a", "b"):
            await fill(tier, key, model("base"))
        async with at_work(tier):
            pass
    monkeypatch.setattr(deduplication, "_share_step", lambda *_: pytest.fail("compared again"))
    async with opened(cache, chunk_size=CHUNK_SIZE) as tier, at_work(tier) as component:
        assert component.statistics() == deduplication.DeduplicationStatistics(shared_bytes=0, waiting_blobs=0)


async def test_a_disk_that_fails_is_logged_and_not_tried_for_ever(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    def failing(*_: object) -> tuple[int, int]:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(deduplication, "_share_step", failing)
    for key in ("a", "b"):
        await fill(tier, key, model("base"))
    async with at_work(tier):
        await trio.sleep(10 * deduplication.INTERVAL_S)

    assert len([record for record in caplog.records if "chunks not shared" in record.message]) == 1


async def test_where_the_file_system_cannot_the_log_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr("trimsfs.tiers.extents.can_share", lambda _directory: False)
    async with opened(tmp_path / "cache", chunk_size=CHUNK_SIZE) as tier:
        await deduplicating(tier).run()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "XFS and btrfs can" in caplog.text


# What is told to those who map


async def test_a_variant_is_told_what_it_has_in_common(tier: DiskTier, autojump_clock: MockClock) -> None:
    contents = {"a": model("a"), "dir/b": model("b", SIZE - 1), "stranger": content_of("stranger", SIZE)}
    generations = {key: await fill(tier, key, content) for key, content in contents.items()}
    async with at_work(tier) as component:
        told = {key: await component.shared_with(generation, lambda _: True) for key, generation in generations.items()}
        assert told["stranger"] == {}
        first, second = sorted(("a", "dir/b"), key=lambda key: tier.blobs.token(generations[key]))
        assert told[first] == {}
        found: dict[str, Any] = told[second]
        assert found["of"] == tier.blobs.token(generations[second])
        assert found["generation"] == tier.blobs.token(generations[first])
        assert found["path"] == {"a": "../a", "dir/b": "dir/b"}[first]
        for offset, at, length in found["parts"]:
            assert contents[second][offset : offset + length] == contents[first][at : at + length]
        assert sum(length for _, _, length in found["parts"]) >= SIZE - LEAST_SHARED
        assert await component.shared_with(generations[second], lambda _: False) == {}


async def test_an_index_that_fails_is_logged_and_nothing_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    def failing(_token: str) -> list[str]:
        raise sqlite3.OperationalError("disk I/O error")

    async with opened(tmp_path / "cache", chunk_size=CHUNK_SIZE) as tier:
        monkeypatch.setattr(tier.index, "family", failing)
        assert await deduplicating(tier).shared_with(generation_of("a", b"content"), lambda _: True) == {}
    assert "disk I/O error" in caplog.text


# What the benchmark counts


def test_the_benchmark_counts_what_a_file_has_in_common_with_another(tmp_path: Path) -> None:
    equal, one, other = (content_of(name, 3 * BLOCK) for name in ("equal", "one", "other"))
    base = saved(tmp_path / "base.safetensors", {"a": equal, "b": one})
    variant = saved(tmp_path / "variant.safetensors", {"a": equal, "b": other})
    moved = saved(tmp_path / "moved.safetensors", {"0": bytes(8), "a": equal})
    assert variant.tensors_in(base) == moved.tensors_in(base) == 3 * BLOCK
    assert variant.tensors_in(base, pages=True) == 2 * BLOCK  # it begins behind a header
    assert moved.tensors_in(base, pages=True) == 0
    assert variant.blocks_in(base, BLOCK) == variant.blocks_in(base, BLOCK, same_place=True) == 3 * BLOCK
    assert moved.blocks_in(base, BLOCK) == 0
    assert base.blocks_in(base, 1 << 20) == len(base.data)


def saved(path: Path, tensors: dict[str, bytes]) -> Content:
    path.write_bytes(safetensors({name: Array("int64", (len(data) // 8,), data) for name, data in tensors.items()}))
    return Content(path)
