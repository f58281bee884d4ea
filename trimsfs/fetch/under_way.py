"""Batches under way: cancels them once nobody wants them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import trio

from trimsfs.concurrency.background import Background
from trimsfs.errors import StoreError, StoreUnavailableError
from trimsfs.fetch.flights import Flight
from trimsfs.fetch.scheduler import FlightScheduler
from trimsfs.tiers.blob import Blob

LINGER_S = 0.1
"""How long an unwanted batch goes on: programs open a file twice in a row, and again after each signal."""


class BatchesUnderWay:
    """The batches that have started and not ended. Calls *land* with a batch that it cancels, and the error."""

    def __init__(
        self,
        scheduler: FlightScheduler,
        background: Background,
        *,
        land: Callable[[Sequence[Flight], StoreError], None],
    ) -> None:
        self._scheduler = scheduler
        self._background = background
        self._land = land
        self._scopes: dict[trio.CancelScope, Sequence[Flight]] = {}
        self._left: dict[Blob, float] = {}

    @contextmanager
    def going_on(self, batch: Sequence[Flight]) -> Iterator[None]:
        """Register a batch for the length of the block, and cancel the block once nobody wants the batch."""
        with trio.CancelScope() as scope:
            self._scopes[scope] = batch
            try:
                yield
            finally:
                del self._scopes[scope]

    def unwanted(self, blob: Blob) -> None:
        """Note that a reader has left a blob: cancel its batches once nobody has wanted them for LINGER_S."""
        if self._background.running and any(_is_of(blob, batch) for batch in self._scopes.values()):
            if blob not in self._left:
                self._background.start(self._stop, blob)
            self._left[blob] = trio.current_time()

    async def _stop(self, blob: Blob) -> None:
        try:
            while trio.current_time() < self._left[blob] + LINGER_S:  # noqa: ASYNC110 - until nothing has happened
                await trio.sleep_until(self._left[blob] + LINGER_S)
        finally:
            del self._left[blob]
        for scope, batch in list(self._scopes.items()):
            if _is_of(blob, batch) and self._scheduler.unwanted(batch):
                # Land them first: a later demand for these chunks then starts a new flight.
                self._land(batch, StoreUnavailableError(f"{blob.generation.key}: no longer wanted"))
                scope.cancel()


def _is_of(blob: Blob, batch: Sequence[Flight]) -> bool:
    """Whether a batch belongs to a blob and has not landed."""
    return batch[0].blob is blob and not all(flight.done.is_set() for flight in batch)
