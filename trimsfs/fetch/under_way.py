"""Batches under way: they are stopped once nobody wants them any more."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import trio

from trimsfs.concurrency.background import Background
from trimsfs.errors import StoreError, StoreUnavailableError
from trimsfs.fetch.scheduler import Flight, FlightScheduler
from trimsfs.tiers.blob import Blob

LINGER_S = 0.1
"""How long what nobody wants any more goes on: many programs open a file twice."""


class BatchesUnderWay:
    """The batches that have started and not ended. *land* is called with one that is stopped, and why."""

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

    @contextmanager
    def going_on(self, batch: Sequence[Flight]) -> Iterator[None]:
        """A batch is under way in this block, which is cancelled when nobody wants it any more."""
        with trio.CancelScope() as scope:
            self._scopes[scope] = batch
            try:
                yield
            finally:
                del self._scopes[scope]

    def unwanted(self, blob: Blob) -> None:
        """Somebody wants no more of a blob: stop what is under way of it, unless somebody wants it in a moment."""
        if self._background.running and any(_is_of(blob, batch) for batch in self._scopes.values()):
            self._background.start(self._stop, blob)

    async def _stop(self, blob: Blob) -> None:
        await trio.sleep(LINGER_S)
        for scope, batch in list(self._scopes.items()):
            if _is_of(blob, batch) and self._scheduler.unwanted(batch):
                # They land first: whoever wants these chunks from now on has them fetched anew.
                self._land(batch, StoreUnavailableError(f"{blob.generation.key}: no longer wanted"))
                scope.cancel()


def _is_of(blob: Blob, batch: Sequence[Flight]) -> bool:
    """Whether a batch is of a blob, and has not landed."""
    return batch[0].blob is blob and not all(flight.done.is_set() for flight in batch)
