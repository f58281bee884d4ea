"""Whether a store answers, as all requests to it tell: not each caller has to find out, and to wait for it."""

import logging
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from trimsfs.errors import StoreError, StoreUnavailableError, TransientStoreError
from trimsfs.handover.ledger import Ledger, RecordKind

log = logging.getLogger(__name__)

T = TypeVar("T")

PROBE_INTERVAL_S, PROBE_TIMEOUT_S = 1.0, 3.0
"""How often a store that has failed is asked whether it answers, and how long it may take."""
FORGOTTEN_AFTER_S = 5.0
"""How long a failure counts without another one."""
TOLD_AFTER_S = 2.0
"""How long a store fails before those who wait for it are told: a probe would have found that it answers."""
ATTEMPTS = 3
"""How often something is tried that fails without an outage: one may have ended just before."""


class CircuitBreaker:
    """Hears of every request to a store.

    ``failing`` tells that a request has failed for a passing reason and that none has been answered since: who can do
    without the store does. ``open`` tells that this has gone on for *deadline_s* seconds: then requests fail at once.
    Either ends with the first answer, whatever it is, and `run` sees to it that the store is asked. The server after
    this one begins as this one ended, by the *ledger*.
    """

    def __init__(self, *, deadline_s: float, ledger: Ledger | None = None) -> None:
        self.deadline_s = deadline_s
        self._answered_at = self._failing_since = self._failed_at = -math.inf
        self._failure = ""
        self._was_open = False
        self.openings = 0
        """How often requests came to fail at once."""
        self.closed_at = -math.inf
        """When requests last ceased to fail at once."""
        self._changed = trio.Event()
        self._ledger = ledger
        self._record: int | None = None
        for record in ledger.inherited(RecordKind.STORE_AWAY) if ledger is not None else ():
            self._record = record.slot
            self.give_up(StoreUnavailableError(record.content.decode()))

    @property
    def failing(self) -> bool:
        """Whether the last that was heard of the store, not long ago, is a failure."""
        return self._failed_at > self._answered_at and trio.current_time() < self._failed_at + FORGOTTEN_AFTER_S

    @property
    def silent_s(self) -> float:
        """For how many seconds requests have failed and none was answered; 0 if the last one was."""
        return trio.current_time() - self._failing_since if self.failing else 0.0

    async def is_silent(self, seconds: float) -> bool:
        """Whether requests still fail once they have for so long; returns at once when one is answered."""
        with trio.move_on_after(seconds - self.silent_s):
            while self.failing:
                await self._changed.wait()
        return self.failing

    @property
    def open(self) -> bool:
        """Whether requests fail at once."""
        return self.failing and self._failed_at - self._failing_since >= self.deadline_s

    @property
    def problem(self) -> str | None:
        """Why requests fail at once, if they do."""
        return self._failure if self.open else None

    @property
    def outage(self) -> tuple[float, str] | None:
        """For how many seconds the store has not answered, and why, if that has lasted."""
        return (self.silent_s, self._failure) if self.silent_s >= TOLD_AFTER_S else None

    def check(self, subject: str) -> None:
        """Raises StoreUnavailableError, which names the *subject*, while requests fail at once."""
        if self.open:
            raise StoreUnavailableError(f"{subject}: the store does not answer: {self._failure}")

    def answered(self) -> None:
        """The store has answered a request."""
        failing = self.failing
        self._answered_at = trio.current_time()
        if failing:
            self._tell()
        if self._was_open:
            log.warning("the store answers again")
            self._was_open = False
            self.closed_at = self._answered_at
            if self._ledger is not None and self._record is not None:
                self._ledger.set_count(self._record, 0)
                self._record = None

    def failed(self, error: TransientStoreError | StoreUnavailableError, began: float) -> None:
        """A request that *began* at a time has failed for a passing reason."""
        if not self.failing:
            self._failing_since = max(began, self._answered_at)
            self._tell()
        self._failed_at, self._failure = trio.current_time(), str(error)
        if self.open and not self._was_open:
            log.warning("the store does not answer: requests fail at once until it does: %s", error)
            self._was_open = True
            self.openings += 1
            if self._ledger is not None and self._record is None:
                self._record = self._ledger.add(RecordKind.STORE_AWAY, 0, self._failure.encode(errors="replace"))
            self._tell()

    def give_up(self, error: StoreUnavailableError) -> None:
        """The store has been asked in vain for long enough: requests fail at once from now on."""
        self._failed_at = -math.inf
        self.failed(error, trio.current_time() - self.deadline_s)

    async def sleep(self, seconds: float) -> None:
        """Sleep until requests fail at once, or so long."""
        with trio.move_on_after(seconds):
            while not self.open:
                await self._changed.wait()

    async def answers(self) -> None:
        """Wait until the store is not known to fail."""
        while self.failing:
            with trio.move_on_after(PROBE_INTERVAL_S):
                await self._changed.wait()

    async def outlast(self, attempt: Callable[[], Awaitable[T]], *, wanted: Callable[[], bool] = lambda: True) -> T:
        """The result of an *attempt* that needs the store, made anew after an outage if it is still *wanted* then.

        Raises as the attempt does for another reason than an outage.
        """
        in_vain = 0
        while True:
            try:
                return await attempt()
            except StoreUnavailableError:
                before = self.openings - self.open
                await self.answers()
                in_vain += self.openings == before  # there was no outage: the store answers others
                if in_vain == ATTEMPTS or not wanted():
                    raise
            await trio.sleep(FORGOTTEN_AFTER_S if in_vain else PROBE_INTERVAL_S)

    async def run(
        self, probe: Callable[[], Awaitable[None]], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Ask the store by a *probe* whether it answers, again and again while it does not."""
        task_status.started()
        while True:
            while not self.failing:
                await self._changed.wait()
            await trio.sleep(PROBE_INTERVAL_S)
            if self.failing:
                await self._probe(probe)

    async def _probe(self, probe: Callable[[], Awaitable[None]]) -> None:
        began = trio.current_time()
        try:
            with trio.move_on_after(PROBE_TIMEOUT_S):
                await probe()
                self.answered()
                return
            raise TransientStoreError(f"no answer within {PROBE_TIMEOUT_S:.0f} s")
        except (TransientStoreError, StoreUnavailableError) as error:
            self.failed(error, began)
        except StoreError:
            self.answered()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
