"""Random sequences of what a server does with the disk tier, and what must hold after every step."""

import os
import random
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from tests.unit.parts import (
    blob_files,
    content_of,
    flip_byte,
    generation_of,
    opened,
    piece,
    recorded_bytes,
    store_chunk,
    verify_chunk,
)
from trimsfs.errors import InUseError
from trimsfs.ranges import chunk_length
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk import DiskTier
from trimsfs.types import Generation

KEYS = "abcde"


class Sequence:
    """A cache directory, the tier that is open on it, and the blobs that are in use."""

    def __init__(self, cache: Path, chunk_size: int, seed: int, *, at_once: int, clock: MockClock) -> None:
        self.random = random.Random(seed)
        self.cache = cache
        self.at_once = at_once
        self.clock = clock
        self.budget = 6 * chunk_size
        self.chunk_size = chunk_size
        self.contents = {key: content_of(key, self.random.randint(1, 4 * chunk_size)) for key in KEYS}
        self.contents["empty"] = b""
        self.in_use: list[Blob] = []
        self.pinned: set[str] = set()
        self.totals: Counter[str] = Counter()
        self.stack = AsyncExitStack()
        self.tier: DiskTier

    def generation(self, key: str) -> Generation:
        return generation_of(key, self.contents[key])

    def any_key(self) -> str:
        return self.random.choice(list(self.contents))

    async def open(self) -> None:
        self.tier = await self.stack.enter_async_context(opened(self.cache, budget=self.budget))

    # Steps

    async def acquire(self) -> None:
        if len(self.in_use) < 3:
            self.in_use.append(await self.tier.acquire(self.generation(self.any_key())))

    async def release(self) -> None:
        if self.in_use:
            self.tier.release(self.in_use.pop(self.random.randrange(len(self.in_use))))

    async def read(self) -> None:
        """What the fetcher does for some chunks of a blob in use, several at once."""
        if not self.in_use:
            return
        blob = self.random.choice(self.in_use)
        absent = [chunk for chunk, state in enumerate(blob.states) if state != ChunkState.VERIFIED]
        async with trio.open_nursery() as nursery:
            for chunk in self.random.sample(absent, min(len(absent), self.at_once)):
                nursery.start_soon(self.fly, blob, chunk)

    async def fly(self, blob: Blob, chunk: int) -> None:
        if blob.states[chunk] == ChunkState.UNVERIFIED and await verify_chunk(self.tier, blob, chunk):
            return
        await store_chunk(self.tier, blob, chunk, piece(self.contents[blob.generation.key], chunk))

    async def evict(self) -> None:
        key = self.any_key()
        busy = key in self.pinned or key in {blob.generation.key for blob in self.in_use}
        if busy and self.contents[key]:
            with suppress(InUseError):
                assert await self.tier.evict(self.generation(key)) == 0
        else:
            before = (await self.tier.residency(self.generation(key))).disk_bytes
            assert await self.tier.evict(self.generation(key)) == before

    async def pin(self) -> None:
        key = self.any_key()
        pinned = key not in self.pinned and len(self.pinned) < 2
        async with self.tier.using(self.generation(key)) as blob:
            await self.tier.pin(blob, pinned)
        (self.pinned.add if pinned and self.contents[key] else self.pinned.discard)(key)

    async def wait(self) -> None:
        self.clock.jump(2)

    async def flush(self) -> None:
        await self.tier.flush()

    async def reopen(self) -> None:
        while self.in_use:
            self.tier.release(self.in_use.pop())
        self.totals.update(evictions=self.tier.statistics().evictions, corrupt=self.tier.statistics().corrupt_chunks)
        self.totals.update(refused=self.tier.statistics().refused_chunks)
        await self.stack.aclose()
        for path in blob_files(self.cache):
            if path.stat().st_size and self.random.random() < 0.3:
                self.damage(path)
        await self.open()

    def damage(self, path: Path) -> None:
        """Do something to a file that a disk, or a person, might do."""
        size = path.stat().st_size
        kind = self.random.choice(["flip", "flip", "truncate", "remove"])
        if kind == "flip":
            flip_byte(path, self.random.randrange(size))
        elif kind == "truncate":
            os.truncate(path, self.random.randrange(size))
        else:
            path.unlink()

    # Invariants

    async def check(self) -> None:
        pinned_before = self.pinned
        statistics = self.tier.statistics()
        assert statistics.used_bytes == await recorded_bytes(self.tier)
        assert 0 <= statistics.used_bytes <= self.budget
        assert statistics.open_blobs == len({id(blob) for blob in self.in_use})
        residencies = await self.tier.residencies()
        for here in residencies:
            assert 0 <= here.disk_bytes <= here.generation.size
            assert here.pinned == (here.generation.key in pinned_before)
        assert {path.name for path in blob_files(self.cache)} <= {here.token for here in residencies}
        for blob in self.in_use:
            content = self.contents[blob.generation.key]
            for chunk, state in enumerate(blob.states):
                start = chunk * self.chunk_size
                stop = start + chunk_length(chunk, len(content))
                if state == ChunkState.VERIFIED:
                    assert blob.view(start, stop) == content[start:stop]
            recorded = next((here.disk_bytes for here in residencies if here.token == blob.token), 0)
            assert blob.present_bytes == recorded


async def play(cache: Path, chunk_size: int, seed: int, *, at_once: int, clock: MockClock) -> Counter[str]:
    sequence = Sequence(cache, chunk_size, seed, at_once=at_once, clock=clock)
    steps = [
        *[sequence.acquire] * 6,
        *[sequence.release] * 4,
        *[sequence.read] * 20,
        sequence.evict,
        sequence.pin,
        sequence.flush,
        *[sequence.wait] * 3,
        sequence.reopen,
    ]
    async with sequence.stack:
        await sequence.open()
        for _ in range(200):
            await sequence.random.choice(steps)()
            await sequence.check()
        await sequence.reopen()
        await sequence.check()
        await sequence.stack.aclose()
    return sequence.totals


async def play_all(tmp_path: Path, chunk_size: int, *, at_once: int, clock: MockClock) -> None:
    totals: Counter[str] = Counter()
    for seed in range(4):
        try:
            totals += await play(tmp_path / f"cache{seed}", chunk_size, seed, at_once=at_once, clock=clock)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
    # The sequences came to where it matters.
    assert min(totals[name] for name in ("evictions", "corrupt", "refused")) > 0


async def test_chunks_one_after_the_other(
    tmp_path: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    monkeypatch.setattr("trimsfs.tiers.room.HEADROOM", chunk_size)
    await play_all(tmp_path, chunk_size, at_once=1, clock=mock_clock)


async def test_chunks_several_at_once(
    tmp_path: Path, chunk_size: int, monkeypatch: pytest.MonkeyPatch, mock_clock: MockClock
) -> None:
    monkeypatch.setattr("trimsfs.tiers.room.HEADROOM", chunk_size)
    await play_all(tmp_path, chunk_size, at_once=4, clock=mock_clock)
