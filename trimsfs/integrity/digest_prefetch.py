"""Digests asked for while an object is still on its way, so that nobody waits for them once all of it is here."""

from collections import OrderedDict

import trio

from trimsfs.concurrency.background import Background
from trimsfs.errors import StoreError
from trimsfs.models.derived_blobs import model_key
from trimsfs.stores.base import Store
from trimsfs.stores.digests import Digest
from trimsfs.tiers.blob import Blob
from trimsfs.types import Generation

MOST_ASKED = 256
"""Answers that are kept until they are wanted."""


class _Question:
    """The answer is there once it is *answered*, unless there was none to be had."""

    def __init__(self) -> None:
        self.ended = trio.Event()
        self.answered = False
        self.digest: Digest | None = None


class DigestPrefetch:
    """Asks *store* once, early. Where that fails, or was not done, *patient* is asked: the same store, tried again."""

    def __init__(self, store: Store, patient: Store) -> None:
        self._store = store
        self._patient = patient
        self._questions: OrderedDict[tuple[str, str], _Question] = OrderedDict()
        self._background = Background()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry questions, for as long as the server runs."""
        await self._background.run(task_status)

    def expect(self, blob: Blob) -> None:
        """All of a blob is being fetched: it will be compared soon."""
        name = blob.generation.key, blob.generation.etag
        if blob.complete or blob.health.compared or name in self._questions or not self._background.running:
            return
        if model_key(blob.generation.key) is not None:
            return  # no object of the store
        question = self._questions[name] = _Question()
        if len(self._questions) > MOST_ASKED:
            self._questions.popitem(last=False)
        self._background.start(self._ask, blob.generation, question)

    async def _ask(self, generation: Generation, question: _Question) -> None:
        try:
            question.digest = await self._store.digest(generation)
            question.answered = True
        except (StoreError, OSError):
            pass  # it is asked again, by whoever wants to know
        finally:
            question.ended.set()

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        """As ``Store.digest``."""
        question = self._questions.pop((generation.key, generation.etag), None)
        if question is not None and not certain:
            await question.ended.wait()
            if question.answered:
                return question.digest
        return await self._patient.digest(generation, certain=certain)
