"""What the tests of integrity have in common."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import crc32c
import trio
from awscrt import checksums

from tests.support.parts import blob_of, flip_byte, until
from tests.support.served import Server, Serving
from tests.support.stores import MemoryStore
from trimsfs.errors import StoreUnavailableError
from trimsfs.filesystem.handles import BACKING_SHIFT
from trimsfs.integrity.integrity import IntegrityStatistics
from trimsfs.stores.digests import Algorithm, Digest
from trimsfs.tiers.blob import Blob

CHUNKS = 5
DAMAGED = "failed", "BlobDamagedError"


@dataclass(frozen=True, slots=True)
class Scene:
    """A store with the object ``a`` of this content; ``serving`` starts a server, always with the same ``cache``."""

    store: MemoryStore
    content: bytes
    chunk_size: int
    cache: Path
    serving: Serving

    @property
    def file(self) -> Path:
        """The file of ``a`` in the cache."""
        token = self.store.generation("a").token(self.store.identity)
        return self.cache / "blobs" / token[:2] / token

    def damage(self, chunk: int = 0) -> None:
        """Change a byte of a chunk in the cache."""
        flip_byte(self.file, chunk * self.chunk_size + 5)

    def tells(self, algorithm: Algorithm, content: bytes | None = None) -> Digest:
        """Have the store tell the digest of ``a``, or of another *content*; an MD5 is an ETag, so it is not certain."""
        told = digest_of(self.content if content is None else content, algorithm, certain=algorithm != "md5")
        self.store.digests["a"] = told
        return told

    def blob(self, server: Server) -> Blob:
        return blob_of(server.disk, self.store, "a")


def digest_of(content: bytes, algorithm: Algorithm, *, certain: bool = True) -> Digest:
    functions: dict[str, Callable[[bytes], bytes]] = {
        "crc64nvme": lambda data: checksums.crc64nvme(data).to_bytes(8),
        "crc32c": lambda data: crc32c.crc32c(data).to_bytes(4),
        "md5": lambda data: hashlib.md5(data).digest(),
        "sha256": lambda data: hashlib.sha256(data).digest(),
    }
    return Digest(algorithm=algorithm, value=functions[algorithm](content), certain=certain)


async def opened(server: Server, path: str = "a") -> int:
    handle = await server.open(path)
    assert handle >> BACKING_SHIFT, "not passed through"
    return handle


def down(store: MemoryStore, *, method: str | None = None) -> None:
    """The store is away, or fails one of its methods, until it is healed."""
    store.fail(StoreUnavailableError("the store is down"), method=method, times=float("inf"))


async def comes_right(server: Server, handle: int, content: bytes) -> bool:
    """Whether what is read of an open file comes to be right within some seconds."""
    deadline = trio.current_time() + 20
    while trio.current_time() < deadline:
        if await server.read(handle) == content:
            return True
        await trio.sleep(0.05)
    return False


async def counted(server: Server, **counts: int) -> None:
    """Wait until the statistics of a server's integrity have these counts."""
    await until(lambda: all(getattr(counts_of(server), name) == count for name, count in counts.items()))


def counts_of(server: Server) -> IntegrityStatistics:
    return server.integrity.statistics()
