"""What the tests of the disk tier have in common."""

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from tests.support.parts import content_of, opened, piece, store_chunk
from trimsfs.tiers.blob import Blob, ChunkState
from trimsfs.tiers.disk.disk_tier import DiskTier

MISSING, UNVERIFIED, VERIFIED = ChunkState


def small(key: str, chunk_size: int, chunks: float = 1) -> bytes:
    """The content of an object of so many chunks."""
    return content_of(key, int(chunks * chunk_size))


async def here(tier: DiskTier) -> dict[str, int]:
    """Bytes on disk of every object that has some."""
    return {found.generation.key: found.disk_bytes for found in await tier.residencies.all() if found.disk_bytes}


async def store(tier: DiskTier, blob: Blob, content: bytes, *chunks: int) -> list[bool]:
    return [await store_chunk(tier, blob, chunk, piece(content, chunk)) for chunk in chunks]


def remove_index(cache: Path) -> None:
    for path in cache.glob("index.sqlite*"):
        path.unlink()


async def synced(tier: DiskTier) -> None:
    """Record and sync all that is written."""
    await tier.journal.flush()
    await tier.journal.sync()


def left(cache: Path, name: str = "left") -> Path:
    """What a server that was killed now would leave."""
    return Path(shutil.copytree(cache, cache.with_name(name)))


def settling(tier: DiskTier) -> trio.Event:
    """An event that is set once a tier that runs has settled what was left."""
    settled = trio.Event()

    async def keep() -> None:
        settled.set()

    tier.space.keep = keep  # type: ignore[method-assign]
    return settled


@asynccontextmanager
async def at_work(cache: Path) -> AsyncIterator[DiskTier]:
    """A tier that has settled what was left, and runs."""
    async with opened(cache) as tier, trio.open_nursery() as nursery:
        settled = settling(tier)
        nursery.start_soon(tier.run)
        await settled.wait()
        yield tier
        nursery.cancel_scope.cancel()


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
