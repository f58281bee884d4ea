"""The circuit breaker: knows from all requests whether the store answers, so that not each caller waits to find out."""

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from trimsfs.errors import BucketNotFoundError, StoreAccessError, StoreError, StoreUnavailableError, TransientStoreError
from trimsfs.handover.ledger import Ledger, RecordKind

log = logging.getLogger(__name__)

T = TypeVar("T")

PROBE_INTERVAL_S, PROBE_TIMEOUT_S = 1.0, 3.0
"""How often a failed store is probed, and how long a probe may take."""
REFUSED_INTERVAL_S = 5.0
"""How often a store that refuses is probed: it answers, so nobody waits for the end."""
READS_REFUSED = "the credentials may list it, but every read so far was refused: they must be allowed s3:GetObject, too"
FORGOTTEN_AFTER_S = 5.0
"""How long a failure counts unless another one follows."""
TOLD_AFTER_S = 2.0
"""How long a store fails before `outage` reports it to waiting callers; a shorter failure ends at the first probe."""
ATTEMPTS = 3
"""Most attempts that fail without an outage: one may have ended just before."""


def as_outage(error: StoreError) -> TransientStoreError | StoreUnavailableError:
    """The error as one of an outage: a store that existed and is gone, as a directory that is not mounted, is away."""
    if isinstance(error, TransientStoreError | StoreUnavailableError):
        return error
    return TransientStoreError(str(error))


class CircuitBreaker:
    """Hears of every request to a store.

    ``failing`` says that a request had a transient failure and none was answered since: callers that can avoid the
    store then do. ``open`` says that this has lasted *deadline_s* seconds: requests then fail at once. Any answer ends
    both; `run` probes the store for one. The *ledger* passes the state on to the next server. Of several stores of a
    mount, this is the one at a *path*.

    A refusal is an answer. Whether it concerns one object or all, the next probe tells.
    """

    def __init__(self, *, deadline_s: float, ledger: Ledger | None = None, path: str = "") -> None:
        self.deadline_s = deadline_s
        self._path = path
        self._subject = f"the store of /{path.rstrip('/')}" if path else "the store"
        self._answered_at = self._failing_since = self._failed_at = -math.inf
        self._failure = ""
        self._was_open = False
        self._doubted = self._probing = False
        self._probe_refused: str | None = None
        self._read, self._reads_refused = False, False
        self.refused_attempts = 0
        """How many requests the store has refused since the server started."""
        self.openings = 0
        """How often the breaker has opened since the server started."""
        self.closed_at = -math.inf
        """When the breaker last closed."""
        self._changed = trio.Event()
        self._ledger = ledger
        self._record: int | None = None
        for record in ledger.inherited(RecordKind.STORE_AWAY) if ledger is not None else ():
            of, _, failure = record.content.decode().rpartition("\0")
            if of == path:
                self._record = record.slot
                self.give_up(StoreUnavailableError(failure))

    @property
    def failing(self) -> bool:
        """Whether the last news of the store is a recent failure."""
        return self._failed_at > self._answered_at and trio.current_time() < self._failed_at + FORGOTTEN_AFTER_S

    @property
    def silent_s(self) -> float:
        """Seconds for which requests have failed and none was answered; 0 if the last one was."""
        return trio.current_time() - self._failing_since if self.failing else 0.0

    async def is_silent(self, seconds: float) -> bool:
        """Wait for news: True once requests have failed for *seconds*, False as soon as one is answered."""
        with trio.move_on_after(seconds - self.silent_s):
            while self.failing:
                await self._changed.wait()
        return self.failing

    @property
    def open(self) -> bool:
        """Whether the breaker is open: requests fail at once."""
        return self.failing and self._failed_at - self._failing_since >= self.deadline_s

    @property
    def problem(self) -> str | None:
        """Why requests fail at once; None if they do not."""
        return self._failure if self.open else None

    @property
    def outage(self) -> tuple[float, str] | None:
        """For how many seconds the store has not answered, and why; None for less than TOLD_AFTER_S."""
        return (self.silent_s, self._failure) if self.silent_s >= TOLD_AFTER_S else None

    @property
    def refusal(self) -> str | None:
        """Why the store refuses all requests, or all reads; None if it does not."""
        unread = self._reads_refused and not self._read
        return self._probe_refused or (READS_REFUSED if unread else None)

    @property
    def known(self) -> bool:
        """Whether nothing has happened that a probe has yet to explain, and no failure is too short to report."""
        return not (self._doubted or self._probing or (self.failing and self.outage is None))

    def doubt(self) -> None:
        """Have `run` probe the store at once: it may refuse the credentials of this server."""
        self._doubted = True
        self._tell()

    def refused(self, *, read: bool = False) -> None:
        """Record that the store has refused a request, a *read* of an object if so."""
        self.answered()
        self.refused_attempts += 1
        self._reads_refused |= read
        self.doubt()

    def has_read(self) -> None:
        """Record that the store has given bytes of an object."""
        self._read = True

    def check(self, subject: str) -> None:
        """Raises StoreUnavailableError, which names the *subject*, while the breaker is open."""
        if self.open:
            raise StoreUnavailableError(f"{subject}: {self._subject} does not answer: {self._failure}")

    def answered(self) -> None:
        """Record that the store has answered a request."""
        failing = self.failing
        self._answered_at = trio.current_time()
        if failing:
            self._tell()
        if self._was_open:
            log.warning("%s answers again", self._subject)
            self._was_open = False
            self.closed_at = self._answered_at
            if self._ledger is not None and self._record is not None:
                self._ledger.set_count(self._record, 0)
                self._record = None

    def failed(self, error: TransientStoreError | StoreUnavailableError, began: float) -> None:
        """Record the transient failure of a request that *began* at a time."""
        if not self.failing:
            self._failing_since = max(began, self._answered_at)
            self._tell()
        self._failed_at, self._failure = trio.current_time(), str(error)
        if self.open and not self._was_open:
            log.warning("%s does not answer: requests fail at once until it does: %s", self._subject, error)
            self._was_open = True
            self.openings += 1
            if self._ledger is not None and self._record is None:
                content = f"{self._path}\0{self._failure}" if self._path else self._failure
                self._record = self._ledger.add(RecordKind.STORE_AWAY, 0, content.encode(errors="replace"))
            self._tell()

    def give_up(self, error: StoreUnavailableError) -> None:
        """Open the breaker: requests have failed for long enough."""
        self._failed_at = -math.inf
        self.failed(error, trio.current_time() - self.deadline_s)

    async def sleep(self, seconds: float) -> None:
        """Sleep for *seconds*, or until the breaker opens."""
        with trio.move_on_after(seconds):
            while not self.open:
                await self._changed.wait()

    async def answers(self) -> None:
        """Wait while `failing`."""
        while self.failing:
            with trio.move_on_after(PROBE_INTERVAL_S):
                await self._changed.wait()

    async def outlast(self, attempt: Callable[[], Awaitable[T]], *, wanted: Callable[[], bool] = lambda: True) -> T:
        """The result of an *attempt* that needs the store, repeated after each outage while it is *wanted*.

        Raises as the attempt does if it fails for another reason than an outage.
        """
        in_vain = 0
        while True:
            try:
                return await attempt()
            except StoreUnavailableError:
                before = self.openings - self.open
                await self.answers()
                in_vain += self.openings == before  # no outage: the store answers other requests
                if in_vain == ATTEMPTS or not wanted():
                    raise
            await trio.sleep(FORGOTTEN_AFTER_S if in_vain else PROBE_INTERVAL_S)

    async def run(
        self, probe: Callable[[], Awaitable[object]], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Repeat a *probe* of the store while it does not answer, or refuses."""
        task_status.started()
        while True:
            while not (self.failing or self._doubted):
                with trio.move_on_after(REFUSED_INTERVAL_S if self._probe_refused else math.inf) as pause:
                    await self._changed.wait()
                self._doubted |= pause.cancelled_caught
            if self._doubted:
                self._doubted, self._probing = False, True
                await self._probe(probe)
                self._probing = False
            await trio.sleep(PROBE_INTERVAL_S)
            if self.failing:
                await self._probe(probe)

    async def _probe(self, probe: Callable[[], Awaitable[object]]) -> None:
        began = trio.current_time()
        try:
            with trio.move_on_after(PROBE_TIMEOUT_S):
                await probe()
                self.answered()
                self._learn(None)
                return
            raise TransientStoreError(f"no answer within {PROBE_TIMEOUT_S:.0f} s")
        except (TransientStoreError, StoreUnavailableError, BucketNotFoundError) as error:
            self.failed(as_outage(error), began)
        except StoreError as error:
            self.answered()
            self._learn(str(error) if isinstance(error, StoreAccessError) else None)
        except Exception:  # a defect: it ends this probe, not the server
            log.exception("%s cannot be probed: internal error", self._subject)

    def _learn(self, refusal: str | None) -> None:
        """Learn from a probe whether the store refuses all requests, and why."""
        if refusal is not None and self._probe_refused is None:
            log.error("%s refuses: %s", self._subject, refusal)
        elif refusal is None and self._probe_refused is not None:
            log.warning("%s no longer refuses", self._subject)
        self._probe_refused = refusal

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
