"""Retries of requests that fail for a passing reason, around any store."""

import itertools
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from trimsfs.errors import StoreUnavailableError, TransientStoreError
from trimsfs.stores.base import PAGE_LIMIT, Page, Sink, Store
from trimsfs.stores.digests import Digest
from trimsfs.types import Generation

log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatistics:
    """Requests since the server started, each with all its attempts, and attempts that failed for a passing reason."""

    requests: int
    failed_attempts: int


class Retrying:
    """Tries transient failures again, with exponential backoff and full jitter, until *deadline_s* has passed.

    What still fails then is a StoreUnavailableError naming the last cause. Other errors pass at once. No attempt
    starts after the deadline; one under way is bounded by the store's own timeouts, so that slow progress
    is not cut. *on_failure*, if any, hears of every failed attempt.
    """

    def __init__(self, *, deadline_s: float, on_failure: Callable[[TransientStoreError], None] | None) -> None:
        self.deadline_s = deadline_s
        self._on_failure = on_failure
        self._requests = self._failures = 0

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(requests=self._requests, failed_attempts=self._failures)

    async def call(self, subject: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """The result of the first *attempt* that succeeds; messages name its *subject*."""
        self._requests += 1
        deadline = trio.current_time() + self.deadline_s
        longest_s = FIRST_WAIT_S
        for number in itertools.count(1):
            try:
                return await attempt()
            except TransientStoreError as error:
                self._failed(subject, number, error)
                now = trio.current_time()
                if now >= deadline:
                    raise StoreUnavailableError(f"{subject}: {error}") from error
            # The last attempt is at the deadline itself: a store that comes back before it is not missed.
            await trio.sleep(min(random.uniform(0, longest_s), max(0.0, deadline - now)))  # noqa: S311 jitter
            longest_s = min(2 * longest_s, LONGEST_WAIT_S)
        raise AssertionError("unreachable: the attempts are not bounded")

    def _failed(self, subject: str, number: int, error: TransientStoreError) -> None:
        self._failures += 1
        log.info("%s: attempt %d failed: %s", subject, number, error)
        if self._on_failure is not None:
            self._on_failure(error)


class RetryingStore:
    """A store whose requests are retried. Reads are not: their caller knows which bytes have come."""

    def __init__(self, store: Store, retrying: Retrying) -> None:
        self._store = store
        self._retrying = retrying

    @property
    def identity(self) -> str:
        return self._store.identity

    @property
    def streaming(self) -> bool:
        return self._store.streaming

    @property
    def forkable(self) -> bool:
        return self._store.forkable

    async def probe(self) -> None:
        await self._retrying.call("no answer", self._store.probe)

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        return await self._retrying.call(
            f"listing of {prefix or '/'}",
            partial(self._store.list_page, prefix, token=token, limit=limit),
        )

    async def stat(self, key: str) -> Generation:
        return await self._retrying.call(key, partial(self._store.stat, key))

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        return await self._store.read(generation, offset, length, sink)

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        return await self._retrying.call(generation.key, partial(self._store.digest, generation, certain=certain))

    async def aclose(self) -> None:
        await self._store.aclose()
