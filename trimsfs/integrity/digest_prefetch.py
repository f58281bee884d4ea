"""Digest prefetch: asks the store for a digest while the object is still being fetched, so that no open waits."""

import logging

import trio
from cachetools import FIFOCache

from trimsfs.concurrency.background import Background
from trimsfs.errors import StoreError
from trimsfs.namespace.derived import model_key
from trimsfs.stores.base import Store
from trimsfs.stores.digests import Digest
from trimsfs.tiers.blob import Blob
from trimsfs.types import Generation

log = logging.getLogger(__name__)

MOST_ASKED = 256
"""Most answers kept until a comparison needs them."""


class _Request:
    """A request to the store. Once it has *ended*, it is *answered* unless it failed."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.answered = False
        self.digest: Digest | None = None


class DigestPrefetch:
    """Asks *store* once, early. Without an answer it asks *patient*, the same store with retries."""

    def __init__(self, store: Store, patient: Store) -> None:
        self._store = store
        self._patient = patient
        self._requests: FIFOCache[str, _Request] = FIFOCache(MOST_ASKED)
        self._background = Background()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run the requests until the server stops."""
        await self._background.run(task_status)

    def expect(self, blob: Blob) -> None:
        """Request the digest of a blob that is being fetched whole: it will be compared soon."""
        token = blob.generation.token(self._store.identity)
        if blob.complete or blob.health.compared or token in self._requests or not self._background.running:
            return
        if model_key(blob.generation.key) is not None:
            return  # a derived blob: the store has no such object
        request = self._requests[token] = _Request()
        self._background.start(self._ask, blob.generation, request)

    async def _ask(self, generation: Generation, request: _Request) -> None:
        try:
            request.digest = await self._store.digest(generation)
            request.answered = True
        except (StoreError, OSError):
            pass  # `digest` asks again
        except Exception:  # a defect: it ends this request, not the server
            log.exception("%s: its digest is not known: internal error", generation.key)
        finally:
            request.ended.set()

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        """As ``Store.digest``, answered by the early request if there is one."""
        request = self._requests.pop(generation.token(self._store.identity), None)
        if request is not None and not certain:
            await request.ended.wait()
            if request.answered:
                return request.digest
        return await self._patient.digest(generation, certain=certain)
