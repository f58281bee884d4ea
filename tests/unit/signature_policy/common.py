"""What the tests of signed files have in common."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import trio

from tests.support.parts import blob_files, blob_of, fail_to_sync, flip_byte
from tests.support.served import Server, Serving
from tests.support.signing import new_key, sign
from tests.support.stores import MemoryStore
from trimsfs.errors import StoreUnavailableError
from trimsfs.integrity.signature_policy import SignaturePolicy
from trimsfs.tiers.blob import Blob

KEY = new_key()
PARAMS = "signed/params"


@dataclass(frozen=True, slots=True)
class Scene:
    """A store with the signed model ``signed``, and ``other``, which is not; ``serving`` starts a server on one cache.

    Both models have the same *files*.
    """

    store: MemoryStore
    files: dict[str, bytes]
    chunk_size: int
    cache: Path
    serving: Serving

    @property
    def params(self) -> bytes:
        return self.files["params"]

    @property
    def chunk(self) -> bytes:
        """The first chunk of `params`."""
        return self.params[: self.chunk_size]

    @property
    def cached(self) -> Path:
        """The file in the cache that is of the size of `params`, which no other is of."""
        (file,) = [file for file in blob_files(self.cache) if file.stat().st_size == len(self.params)]
        return file

    def damage(self, chunk: int = 0) -> None:
        """Change a byte of `params` in the cache."""
        flip_byte(self.cached, chunk * self.chunk_size + 5)

    def sign(self, model: str = "signed", **changed: bytes | None) -> None:
        """Sign a model anew: its files, with others of these names, or without those that are None."""
        files = {name: data for name, data in (self.files | changed).items() if data is not None}
        self.store.put(f"{model}/model.sig", sign(KEY, files) + b"\n")

    def give(self, content: bytes) -> None:
        """Let the store give other bytes of the signed `params`, under the same ETag."""
        self.store.contents[PARAMS, self.store.generation(PARAMS).etag] = content

    def away(self) -> None:
        """The store does not answer, until it is healed."""
        self.store.fail(StoreUnavailableError("the store is down"), times=float("inf"))

    def blob(self, server: Server, key: str = PARAMS) -> Blob:
        return blob_of(server.disk, self.store, key)

    async def opened_and_lost(self, server: Server) -> tuple[int, Blob]:
        """A handle of `params` that could not be synced after its open, so that its bytes count as lost; its blob."""
        handle = await server.open(PARAMS)
        blob = self.blob(server)
        await fail_to_sync(server.disk, blob)
        assert not blob.complete
        return handle, blob


def policy_of(server: Server) -> SignaturePolicy:
    policy = server.filesystem._trust.signature_policy
    assert policy is not None
    return policy


def slow_down_digests(server: Server) -> list[bool]:
    """Let digests take as long as those of a large file; the list grows with each that begins."""
    begun: list[bool] = []

    async def slow(real: Callable[..., Awaitable[bytes | None]], *arguments: object) -> bytes | None:
        begun.append(True)
        await trio.sleep(0.3)
        return await real(*arguments)

    copier = server.integrity.comparer._copier
    copier.digest = partial(slow, copier.digest)  # type: ignore[method-assign]
    return begun
