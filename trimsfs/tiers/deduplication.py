"""Deduplication: stores equal bytes of blobs once on a file system that can share blocks (XFS, btrfs).

Fine-tuned models have most of their bytes in common. The index finds chunks with the same checksum, and the kernel
compares the bytes before it shares them. If chunks of related blobs differ, their equal parts are shared.
"""

import logging
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from trimsfs.errors import InUseError
from trimsfs.tiers import extents
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.blob_files import BlobFiles
from trimsfs.tiers.disk.interfaces import KnownBlobs
from trimsfs.tiers.host import page_cache
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.threads import Threads
from trimsfs.types import Generation

log = logging.getLogger(__name__)

INTERVAL_S = 5.0
REST = 3
"""Seconds of rest per second of work, to leave disk and processors to readers."""
STEP = 2 << 20
"""Bytes to compare per lock of two files: readers wait less than a millisecond."""
LEAST_BYTES = 1 << 20
"""Size of the smallest blob worth comparing."""
RELATIVES = 4
"""Most blobs to compare a blob with, part by part."""
PROBES = 2
"""Chunks to compare with each of these before it counts as unrelated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeduplicationStatistics:
    """Bytes freed on disk since the server started, and whole blobs not compared yet."""

    shared_bytes: int
    waiting_blobs: int


class Deduplication:
    """Compares each whole blob once with those compared before it, and makes it share their blocks.

    It compares only idle blobs, which are neither in use nor pinned: on XFS, sharing may drop their pages from memory.
    Blobs with nothing in common, and those compared before, keep their blocks and pages.
    """

    def __init__(
        self, directory: Path, blobs: KnownBlobs, files: BlobFiles, index: BlobIndex, *, chunk_size: int
    ) -> None:
        self._directory = directory
        self._blobs = blobs
        self._files = files
        self._index = index
        self._chunk_size = chunk_size
        self._threads = Threads(2)
        self._waiting = 0
        self._to_be_idle: set[str] = set()
        self._shared = 0

    def statistics(self) -> DeduplicationStatistics:
        return DeduplicationStatistics(shared_bytes=self._shared, waiting_blobs=self._waiting)

    async def run(self) -> None:
        """Share equal chunks until the server stops, if the file system can."""
        directory = self._directory
        try:
            if not await self._threads.run(extents.can_share, directory):
                log.warning("%s: chunks are not shared: this file system cannot, XFS and btrfs can", directory)
                return
        except OSError as error:
            log.error("%s: chunks are not shared: %s", directory, error)
            return
        while True:
            await trio.sleep(INTERVAL_S)
            try:
                await self._compare_all()
            except sqlite3.Error as error:
                log.error("cannot read or write the cache index: %s", error)

    async def _compare_all(self) -> None:
        tokens = await self._threads.run(self._index.uncompared, LEAST_BYTES)
        self._waiting = len(tokens)
        for token in tokens:
            if token in self._to_be_idle and not self._idle(token):
                continue
            before, relative = self._shared, None
            try:
                relative = await self._compare(token)
            except InUseError:
                self._to_be_idle.add(token)
                continue
            except OSError as error:
                log.error("blob %s: chunks not shared: %s", token, error)
            if self._shared > before:
                log.info("blob %s: %d bytes shared with other models", token, self._shared - before)
            await self._threads.run(self._index.set_compared, token, relative)
            self._to_be_idle.discard(token)
            self._waiting -= 1

    def _idle(self, token: str) -> bool:
        """Whether a blob is neither in use nor pinned."""
        blob = self._blobs.known(token)
        return blob is None or (blob.users == 0 and not blob.pinned)

    async def _compare(self, token: str) -> str | None:
        """Share a blob's blocks; returns a related blob's token or None. Raises InUseError unless the blob is idle."""
        index = self._index
        alone, related = [], []
        for chunk, twin in await self._threads.run(index.twins, token):
            if twin is None:
                alone.append(chunk)
            elif await self._share(token, chunk, *twin):
                related.append(twin[0])
        others = [*related, *await self._threads.run(index.of_same_size, token, RELATIVES)]
        for other in list(dict.fromkeys(others))[:RELATIVES]:
            if await self._share_parts(token, alone, other):
                related.append(other)
                break
        return related[0] if related else None

    async def _share_parts(self, token: str, chunks: Sequence[int], other: str) -> bool:
        """Share parts of chunks with the same chunks of another blob; returns whether any are equal."""
        common = 0
        for number, chunk in enumerate(chunks):
            if number == PROBES and not common:
                break
            common += await self._share(token, chunk, other, chunk)
        return common > 0

    async def _share(self, token: str, chunk: int, other: str, other_chunk: int) -> int:
        """Share the equal parts of two chunks, step by step; returns the number of bytes that they now share."""
        chunk_size = self._chunk_size
        shift = (other_chunk - chunk) * chunk_size
        common = 0
        for start in range(chunk * chunk_size, (chunk + 1) * chunk_size, STEP):
            if not self._idle(token):
                raise InUseError(token)
            began = trio.current_time()
            try:
                before, now = await self._threads.run(
                    _share_step, self._files.path(other), start + shift, self._files.path(token), start
                )
            except FileNotFoundError:
                break  # one of the blobs was evicted
            common += now
            self._shared += now - before
            await trio.sleep(REST * (trio.current_time() - began))
        return common

    async def shared_with(self, model: Generation, ready: Callable[[Blob], bool]) -> dict[str, object]:
        """Another model that is *ready* to be mapped, and the parts where both share blocks; empty if there is none.

        ``path`` is relative to the model's directory; ``of`` and ``generation`` name the contents of both. Each of the
        ``parts`` is an offset in the model, an offset in the other model, and a length. All models of a family get the
        same other model while that is ready; that model gets none.
        """
        token = self._blobs.token(model)
        try:
            family = await self._threads.run(self._index.family, token)
            for other in family[: family.index(token) if token in family else 0]:
                blob = self._blobs.known(other)
                if blob is not None and ready(blob):
                    parts = await self._threads.run(_parts, self._files.path(token), self._files.path(other))
                    if parts:
                        path = _relative(blob.generation.key, model.key)
                        return {"of": token, "path": path, "generation": other, "parts": parts}
        except (OSError, sqlite3.Error) as error:
            log.error("%s: cannot find the blocks that it shares with other models: %s", model.key, error)
        return {}


def _share_step(source: Path, at: int, target: Path, start: int) -> tuple[int, int]:
    """Share the equal parts of one step of two files; returns the bytes that they shared before, and share now."""
    with source.open("rb", buffering=0) as source_file, target.open("r+b", buffering=0) as target_file:
        one, other = source_file.fileno(), target_file.fileno()
        length = min(STEP, os.fstat(one).st_size - at, os.fstat(other).st_size - start)
        if length <= 0:
            return 0, 0
        before = sum(part.length for part in extents.shared_extents(other, one, offset=start, at=at, length=length))
        if before == length:
            return before, before
        parts = ((one, at), (other, start))
        in_memory = [page_cache.resident_bytes(descriptor, offset, length) for descriptor, offset in parts]
        for (descriptor, offset), resident in zip(parts, in_memory, strict=True):
            if resident is None or resident < length:
                # Read first: the kernel would read page by page while both files are locked.
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # no readahead
                os.pread(descriptor, length, offset)
        now = extents.share(one, at, other, start, length)
        for (descriptor, offset), resident in zip(parts, in_memory, strict=True):
            if resident == 0:
                os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
            elif descriptor == other:
                page_cache.populate(descriptor, offset, offset + length)
        return before, max(before, now)


def _parts(model: Path, other: Path) -> list[tuple[int, int, int]]:
    """The parts of a file that share blocks with another; empty if they are too few to matter."""
    with model.open("rb") as one, other.open("rb") as another:
        parts = extents.shared_extents(one.fileno(), another.fileno(), length=os.fstat(one.fileno()).st_size)
    large = [(part.offset, part.at, part.length) for part in parts if part.length >= extents.LEAST_SHARED]
    return large if sum(length for _, _, length in large) >= LEAST_BYTES else []


def _relative(key: str, other: str) -> str:
    """The path of an object from the directory of another."""
    return os.path.relpath(f"/{key}", os.path.dirname(f"/{other}"))
