"""What the tests of integrity have in common."""

import hashlib
from collections.abc import Callable

import crc32c
import trio
from awscrt import checksums

from tests.support.served import Server
from tests.support.stores import MemoryStore
from trimsfs.errors import StoreUnavailableError
from trimsfs.filesystem.handles import BACKING_SHIFT
from trimsfs.stores.digests import Algorithm, Digest

CHUNKS = 5


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
