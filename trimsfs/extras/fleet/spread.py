"""Spreads files over the fleet before many hosts want them at once."""

from functools import partial

import trio

from trimsfs.errors import InvalidRequestError, StoreUnavailableError, TransientStoreError, TrimsError
from trimsfs.extras.fleet.fleet_source import FleetSource
from trimsfs.fetch.copier import Copier
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.fetch.peers import PeerAnswer
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import BlobUse
from trimsfs.types import Generation

CHUNKS_AT_ONCE = 32
ATTEMPTS = 5
PAUSE_S = 1.0


class Spreader:
    """Has the owners of each chunk of a file fetch it: first the first, then the second from the first."""

    def __init__(self, source: FleetSource, blobs: BlobUse, fetcher: Fetcher, copier: Copier) -> None:
        self._source = source
        self._blobs = blobs
        self._fetcher = fetcher
        self._copier = copier

    async def spread(self, generation: Generation) -> None:
        """Spread a file. Raises InvalidRequestError without a fleet or another member, and StoreUnavailableError."""
        if not self._source.on:
            raise InvalidRequestError(f"{generation.key}: the fleet is off here: `trimsfs fleet on`")
        slots = trio.Semaphore(CHUNKS_AT_ONCE)
        failures: list[str] = []
        async with self._blobs.using(generation) as blob:
            if blob.states and not self._source.owners(blob, 0):
                raise InvalidRequestError(f"{generation.key}: no other member answers: see `trimsfs status`")
            async with trio.open_nursery() as nursery:
                for chunk in range(len(blob.states)):
                    await slots.acquire()
                    nursery.start_soon(self._give, blob, chunk, slots, failures)
        if failures:
            raise StoreUnavailableError(f"{generation.key}: {len(failures)} chunks not spread: {failures[0]}")

    async def _give(self, blob: Blob, chunk: int, slots: trio.Semaphore, failures: list[str]) -> None:
        try:
            owners = self._source.owners(blob, chunk)
            if not owners:
                failures.append("no other member answers, or the fleet is off here: see `trimsfs status`")
            for owner in owners:
                problem = None if self._source.is_me(owner) else await self._order_fetch(blob, chunk, owner)
                if problem is not None:
                    failures.append(f"{owner}: {problem}")
                elif self._source.is_me(owner):
                    try:
                        await self._fetcher.fetch_for_others(blob, range(chunk, chunk + 1))
                    except TrimsError as error:
                        failures.append(str(error))
        finally:
            slots.release()

    async def _order_fetch(self, blob: Blob, chunk: int, owner: str) -> str | None:
        """Have another member fetch a chunk; why it has not."""
        ask = partial(self._source.request, blob, chunk, owner, sends=False)
        for _ in range(ATTEMPTS):
            try:
                answer = await self._copier.ask_peer(ask())
            except TransientStoreError as error:  # the fetch process died
                answer = PeerAnswer(outcome="busy", detail=str(error))
            else:
                self._source.answered(owner, answer)
            if answer.outcome in {"ok", "self"}:
                return None
            await trio.sleep(PAUSE_S)
        return f"{answer.outcome}: {answer.detail}"
