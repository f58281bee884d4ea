"""Retries of transient failures, for any store."""

import itertools
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from trimsfs.errors import (
    BucketNotFoundError,
    ObjectChangedError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreSlowError,
    StoreUnavailableError,
    StoreUnclearError,
    TransientStoreError,
    WorkerLostError,
)
from trimsfs.origins import ByPath, by_path
from trimsfs.stores.base import PAGE_LIMIT, Page, Store, StoreWrapper
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.stores.digests import Digest
from trimsfs.stores.recent_failures import RecentFailures
from trimsfs.telemetry.histogram import Histogram
from trimsfs.types import Generation

log = logging.getLogger(__name__)

T = TypeVar("T")

OUTCOMES: dict[type[BaseException], str] = {
    TransientStoreError: "transient",
    ObjectNotFoundError: "not_found",
    ObjectChangedError: "changed",
    StoreAccessError: "refused",
    StoreError: "failed",
    trio.Cancelled: "cancelled",
}
"""How attempts at requests end, but for "success", by the error; what else there is says nothing of the store."""
MOST_SLOW = 3
"""Slow attempts that count as answers while nothing of a request is done; then it ends as if the store were silent."""
MOST_LOST = 3
"""Attempts whose fetch process is lost that do not count; then a request ends as if the store were silent."""
CROWDED_DEADLINES = 8
"""Deadlines that a request has at most without an answer, while others get bytes of a store that is crowded."""
FIRST_WAIT_S = 0.1
LONGEST_WAIT_S = 3.0


def _nothing_yet() -> float:
    """The default of *heard*: the store has sent nothing yet."""
    return -math.inf


def request_histogram() -> Histogram:
    """A histogram of how long requests take, by their outcome."""
    return Histogram("outcome", ["success", *OUTCOMES.values()])


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatistics:
    """Counts since the server started: requests (each with its retries), and attempts that failed or were refused.

    ``request_seconds`` is how long the attempts took, by outcome: of the store alone, not of work in fetch processes.
    ``circuit_open`` is 1 while requests fail at once, ``circuit_openings`` how often that began.
    """

    requests: int
    failed_attempts: int
    request_seconds: Histogram
    circuit_open: int
    circuit_openings: int


@dataclass(slots=True)
class _LastAnswer:
    """Since when a request counts as unanswered: its begin, its last chunk, a slow body or a lost fetch process."""

    at: float
    _slow: int = 0
    _lost: int = 0

    def deadline(self, deadline_s: float, others: float) -> float:
        """When the request ends without an answer, if *others* had bytes last at that time."""
        return min(max(self.at, others), self.at + (CROWDED_DEADLINES - 1) * deadline_s) + deadline_s

    def failed(self, error: TransientStoreError, heard: float, breaker: CircuitBreaker) -> None:
        """Learn from a failed attempt, and from when the store was last heard; tell the breaker."""
        if heard > self.at:
            self.at, self._slow, self._lost = heard, 0, 0
        if isinstance(error, WorkerLostError):
            if self._lost < MOST_LOST:
                self.at, self._lost = trio.current_time(), self._lost + 1
            return
        if not isinstance(error, StoreSlowError):
            breaker.failed(error, self.at)
            return
        breaker.answered()
        if self._slow < MOST_SLOW:
            self.at, self._slow = trio.current_time(), self._slow + 1


class Retrying:
    """Retries transient failures with exponential backoff and full jitter, until *deadline_s* has passed.

    Then it raises StoreUnavailableError, which names the last cause. Other errors pass at once. No attempt starts after
    the deadline; the store's own timeouts bound one under way, so that slow progress is not cut off. A body that came
    slowly counts as an answer: the deadline is that of a silent store. *on_failure*, if any, hears of every failed
    attempt. No attempt starts while the *breaker* is open, or for a blob with a recent failure. With *reached*, the
    store is known to exist: if it is missing now, that is a transient failure. Several stores of a mount have one
    histogram of *request_seconds*.
    """

    def __init__(
        self,
        *,
        deadline_s: float,
        on_failure: Callable[[TransientStoreError], None] | None,
        breaker: CircuitBreaker | None = None,
        reached: bool = False,
        request_seconds: Histogram | None = None,
    ) -> None:
        self.deadline_s = deadline_s
        self._reached = reached
        self._on_failure = on_failure
        self.breaker = breaker or CircuitBreaker(deadline_s=deadline_s)
        self._recent = RecentFailures()
        self._requests = self._failures = 0
        self._request_seconds = request_seconds or request_histogram()

    def statistics(self) -> StoreStatistics:
        return StoreStatistics(
            requests=self._requests,
            failed_attempts=self._failures + self.breaker.refused_attempts,
            request_seconds=self._request_seconds,
            circuit_open=int(self.breaker.open),
            circuit_openings=self.breaker.openings,
        )

    def problem(self, token: str) -> str | None:
        """Why no fetch of the blob with this token may start now; None if one may."""
        return self._recent.problem(token, since=self.breaker.closed_at) or self.breaker.problem

    def check(self, subject: str, token: str) -> None:
        """Raises StoreUnavailableError while no fetch of the blob with this token may start."""
        self.breaker.check(subject)
        problem = self.problem(token)
        if problem is not None:
            raise StoreUnavailableError(problem)

    async def call(
        self,
        subject: str,
        attempt: Callable[[], Awaitable[T]],
        *,
        heard: Callable[[], float] = _nothing_yet,
        others: Callable[[], float] = _nothing_yet,
        turn: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
        token: str | None = None,
    ) -> T:
        """The result of the first successful *attempt* at a request; messages name its *subject*.

        *heard* returns when the store last sent a part of the answer: the deadline counts from then. *others* returns
        when it last sent anything: a store that is crowded has CROWDED_DEADLINES. Each attempt but the first waits for
        its *turn*, and the deadline with it. A fetch passes the *token* of its blob.
        """
        self._requests += 1
        return await self._call(subject, partial(self._timed, attempt), self.breaker, heard, others, turn, token)

    async def call_locally(self, subject: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """As `call`, for work that needs a fetch process but not the store: statistics do not count it."""
        return await self._call(subject, attempt, CircuitBreaker(deadline_s=math.inf))

    async def _timed(self, attempt: Callable[[], Awaitable[T]]) -> T:
        began, outcome = time.perf_counter(), "success"
        try:
            return await attempt()
        except BaseException as error:
            outcomes = (outcome for kind, outcome in OUTCOMES.items() if isinstance(error, kind))
            outcome = "" if isinstance(error, WorkerLostError) else next(outcomes, "")
            raise
        finally:
            if outcome:
                self._request_seconds.observe(time.perf_counter() - began, outcome)

    async def _call(
        self,
        subject: str,
        attempt: Callable[[], Awaitable[T]],
        breaker: CircuitBreaker,
        heard: Callable[[], float] = _nothing_yet,
        others: Callable[[], float] = _nothing_yet,
        turn: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
        token: str | None = None,
    ) -> T:
        answer = _LastAnswer(trio.current_time())
        longest_s = FIRST_WAIT_S
        for number in itertools.count(1):
            if token is None:
                breaker.check(subject)
            else:
                self.check(subject, token)
            try:
                result = await attempt()
            except (TransientStoreError, BucketNotFoundError) as raised:
                if isinstance(raised, BucketNotFoundError) and not self._reached:
                    raise
                error = raised if isinstance(raised, TransientStoreError) else TransientStoreError(str(raised))
                log.info("%s: attempt %d failed: %s", subject, number, error)
                if breaker is self.breaker and not isinstance(error, WorkerLostError):  # the store has failed
                    self._failures += 1
                    if self._on_failure is not None:
                        self._on_failure(error)
                answer.failed(error, heard(), breaker)
                _raise_refusal(breaker, subject, error)
                now, deadline = trio.current_time(), answer.deadline(self.deadline_s, others())
                if now >= deadline:
                    failure = StoreUnavailableError(f"{subject}: {error}")
                    if token is not None:
                        self._recent.add(token, failure)
                    raise failure from error
            except StoreError as error:
                _tell(breaker, error, read=token is not None)
                raise
            else:
                breaker.answered()
                if token is not None:
                    breaker.has_read()
                return result
            # The last attempt starts at the deadline itself, in case the store has just come back.
            await breaker.sleep(min(random.uniform(0, longest_s), max(0.0, deadline - now)))  # noqa: S311 jitter
            longest_s = min(2 * longest_s, LONGEST_WAIT_S)
            answer.at += await _seconds_of(turn)
        raise AssertionError("unreachable: the attempts are not bounded")


async def _seconds_of(turn: Callable[[], Awaitable[None]]) -> float:
    """Wait for a turn; for how long."""
    began = trio.current_time()
    await turn()
    return trio.current_time() - began


def _raise_refusal(breaker: CircuitBreaker, subject: str, error: StoreError) -> None:
    """Raise StoreAccessError for an unclear error of a store that is known to refuse."""
    if isinstance(error, StoreUnclearError) and breaker.refusal is not None:
        raise StoreAccessError(f"{subject}: {breaker.refusal}") from error


def _tell(breaker: CircuitBreaker, error: StoreError, *, read: bool) -> None:
    """Tell a breaker of an error that no other attempt would mend, of a *read* or of another request."""
    if isinstance(error, StoreAccessError):
        breaker.refused(read=read)
    elif not isinstance(error, StoreUnavailableError):
        breaker.answered()


class RetryingStore(StoreWrapper):
    """A store that retries requests, except for reads: their caller knows which bytes have arrived.

    A `StoreRouter` has a *retrying* for each of its stores.
    """

    def __init__(self, store: Store, retrying: Retrying | ByPath[Retrying]) -> None:
        super().__init__(store)
        self._retrying = by_path(retrying)

    async def probe(self) -> None:
        await self._retrying.of("").call("no answer", self.store.probe)

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        return await self._retrying.of(prefix).call(
            f"listing of {prefix or '/'}", partial(self.store.list_page, prefix, token=token, limit=limit)
        )

    async def stat(self, key: str) -> Generation:
        return await self._retrying.of(key).call(key, partial(self.store.stat, key))

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        request = partial(self.store.digest, generation, certain=certain)
        return await self._retrying.of(generation.key).call(generation.key, request)
