"""The source of a chunk: this host's store, if it owns the chunk, else the member that does."""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import takewhile

import trio

from trimsfs.errors import TransientStoreError
from trimsfs.extras.fleet.member_health import Health, RetryBudget
from trimsfs.extras.fleet.members import Members
from trimsfs.extras.fleet.placement import Placement, seed_of
from trimsfs.extras.fleet.protocol import ChunkRequest, fleet_token
from trimsfs.fetch.copier import Copier, Extent
from trimsfs.fetch.flights import Flight, Lane
from trimsfs.fetch.peers import PeerAnswer, PeerRequest
from trimsfs.fetch.scheduler import PEER_REQUESTS
from trimsfs.telemetry.open_trace import REQUEST, spanning
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import ChunkWrites
from trimsfs.types import ChunkRecord, Generation

OWNERS = 2
"""How many members own a chunk: the second is asked if the first is slow, busy or down."""
HOLDERS = 3
"""How many members that perhaps have a chunk are asked before the store: those that owned it before others joined."""
LAG, LAG_OF_FIRST = 3.0, 8.0
"""A chunk is late when its rest will take this many times as long as a whole chunk from others. After LAG, a host asks
the other owner. After LAG_OF_FIRST, the second owner asks the store. Both double in each further round."""
ROUNDS = 4
"""How often the owners are asked while they are busy."""
BUSY_PAUSE_S = 0.2
"""The first pause after the owners were busy; each further one is twice as long."""
ARRIVALS, ARRIVING_S = 3, 0.2
"""How often a member is asked that an owner has sent a chunk to, and the pause: the last bytes may be on the way."""
AHEAD = PEER_REQUESTS
"""Chunks that share the link with one that is asked for: a reader of a large file asks for more at once."""
FINDING_S = 1.0
"""How long a host that is not listed asks members whether they are itself."""
KNOWN_CONTENTS = 1024
"""Contents of which the place in the fleet is remembered."""


@dataclass(slots=True)
class Counts:
    """Requests to members by what came of them, and chunks of theirs for which the store was asked in their place."""

    received_bytes: int = 0
    received_chunks: int = 0
    store_chunks: int = 0
    damaged_chunks: int = 0
    slow_requests: int = 0
    busy_requests: int = 0
    failed_requests: int = 0


class FleetSource:
    """Fetches chunks from the members that own them; as `trimsfs.fetch.peers.Peers`.

    The first owner fetches a chunk from the store; the second, and all others, from the owners. An owner that is down
    is passed over. Calls *came* with the blob and size of what members send. Only while it is ``on``.
    """

    def __init__(
        self,
        fleet: str,
        members: Members,
        health: Health,
        copier: Copier,
        writes: ChunkWrites,
        *,
        came: Callable[[Blob, int], None],
    ) -> None:
        self._fleet = fleet
        self._members = members
        self._health = health
        self._copier = copier
        self._writes = writes
        self._came = came
        self._placed, self._placement = (frozenset[str](), frozenset[str]()), Placement(())
        self._budget = RetryBudget()
        self._finding, self._searched = trio.Lock(), frozenset[str]()
        self._contents: dict[str, tuple[Generation, str, int]] = {}
        self.counts = Counts()
        self.on = True

    def hosts(self) -> int:
        """How many hosts fetch from the store for each other, with this one."""
        if not self.on:
            return 1
        return 1 + len(self._members.addresses - self._members.mine - self._health.down())

    def lane(self, blob: Blob, chunk: int) -> Lane:
        """Where a chunk most likely comes from."""
        first = self.owners(blob, chunk)[:1]
        return Lane.PEERS if first and not self.is_me(first[0]) else Lane.STORE

    def is_me(self, member: str) -> bool:
        """Whether a member is this host."""
        return member in self._members.mine

    async def fetch(self, flight: Flight, *, deadline: float, away: Callable[[], bool]) -> bool:
        """Fetch a chunk into its blob; returns whether it is there. If not, the store is to be asked."""
        if await self._fetched(flight, deadline, away):
            return True
        blob, chunk = flight.blob, flight.chunk
        if self.on and blob.attached and not all(map(self.is_me, self._ranked(blob, chunk, 1))):
            self.counts.store_chunks += 1  # of another member, which may be down
        return False

    async def _fetched(self, flight: Flight, deadline: float, away: Callable[[], bool]) -> bool:
        blob = flight.blob
        size = blob.length_of(flight.chunk)
        # Without room, the bytes come from the store: nothing could compare those of a member with the file's digest.
        if not self.owners(blob, flight.chunk) or not await self._writes.reserve(blob, size):
            return False
        written = False
        try:
            record = await self._from_members(flight, deadline, away)
            if record is not None and not flight.done.is_set():
                self._writes.wrote(blob, record)
                written = True
        except OSError as error:
            written = True  # the tier returns the space
            await self._writes.write_failed(blob, size, error, last=False)
            return False
        finally:
            if not written:
                self._writes.unreserve(blob, size)
        if not written:
            return flight.done.is_set()
        self._came(blob, size)
        return True

    def owners(self, blob: Blob, chunk: int, count: int = OWNERS) -> list[str]:
        """The members that own a chunk, without those that are down, and the next ones up to a *count*; none if this
        host is alone."""
        if not self.on or not blob.attached:
            return []
        down = self._health.down()
        if self._members.addresses - down <= self._members.mine:
            return []
        return self._ranked(blob, chunk, count, without=down)

    def _ranked(self, blob: Blob, chunk: int, count: int, *, without: Collection[str] = ()) -> list[str]:
        addresses, mine = placed = (self._members.addresses, self._members.mine)
        if self._placed != placed:
            self._placed, self._placement = placed, Placement(addresses | mine)
            self._health.keep(addresses)
        return self._placement.ranked(self._content(blob)[2], chunk, count, without=without)

    def _content(self, blob: Blob) -> tuple[Generation, str, int]:
        """A blob's token in the fleet, and its number in placements."""
        known = self._contents.get(blob.token)
        if known is None or known[0].etag != blob.generation.etag:
            if len(self._contents) >= KNOWN_CONTENTS:
                self._contents.clear()
            token = fleet_token(self._fleet, blob.generation, blob.chunk_size)
            known = self._contents[blob.token] = (blob.generation, token, seed_of(token))
        return known

    async def _from_members(self, flight: Flight, deadline: float, away: Callable[[], bool]) -> ChunkRecord | None:
        """Fetch a chunk from the members; None if the store is to be asked. Raises OSError."""
        blob, chunk = flight.blob, flight.chunk
        if self._members.me is None:
            await self._find_itself(blob, chunk)
        tried, asked, busy, failed = set[str](), set[str](), False, False
        for number in range(ROUNDS * OWNERS):
            ranked = self.owners(blob, chunk, 1 + HOLDERS)
            if not ranked or self.is_me(ranked[0]):
                return await self._cached(flight, [each for each in ranked if each not in tried])
            owners = ranked[:OWNERS]
            above = list(takewhile(lambda owner: not self.is_me(owner), owners))
            if above != owners and self._health.is_slow(above[0]) and not away():
                return None  # this host is the other owner, and others wait for it
            left = [owner for owner in above if owner not in tried]
            if not left and not busy:
                if above != owners:
                    return None  # this host is the other owner
                break
            late = trio.current_time() >= deadline and asked.issuperset(above)
            if late and (record := await self._cached(flight, left or above)) is not None:
                return record
            if late or (not left and away()):
                break
            if not left:
                tried.clear()
                busy = False
                await trio.sleep(BUSY_PAUSE_S * 2 ** (number // OWNERS) * random.uniform(0.5, 1))  # noqa: S311 jitter
                continue
            size = blob.length_of(chunk)
            member = min(left, key=lambda owner: (self._health.is_slow(owner), self._health.expected_s(owner, size)))
            tried.add(member)
            asked.add(member)
            lag = (LAG if above == owners else LAG_OF_FIRST) * 2 ** (number // OWNERS)
            answer, record = await self._ask(flight, member, lag=None if away() else lag)
            failed = failed or answer.outcome not in {"ok", "absent", "other", "away", "self"}
            busy = busy or (answer.outcome == "slow" and above == owners)  # the store would send the chunk once more
            if record is None and answer.outcome == "busy":
                busy = True
                record = await self._arriving(flight, [each for each in answer.holders if each not in tried])
            if record is not None:
                self._budget.add()
                return record
        if failed and not away():  # else the store is not asked
            await self._budget.take()
        return None

    async def _cached(self, flight: Flight, members: list[str]) -> ChunkRecord | None:
        """Fetch a chunk from one of some members that perhaps have it. Raises OSError."""
        for member in members[:HOLDERS]:
            if member in self._members.addresses and not self.is_me(member):
                _, record = await self._ask(flight, member, cached_only=True)
                if record is not None:
                    return record
        return None

    async def _arriving(self, flight: Flight, holders: list[str]) -> ChunkRecord | None:
        """Fetch a chunk from members that an owner has sent it to. Raises OSError."""
        for number in range(ARRIVALS if holders else 0):
            if number:
                await trio.sleep(ARRIVING_S)
            record = await self._cached(flight, holders)
            if record is not None:
                return record
        return None

    async def _ask(
        self, flight: Flight, member: str, *, cached_only: bool = False, lag: float | None = None
    ) -> tuple[PeerAnswer, ChunkRecord | None]:
        """Ask a member for a chunk; the chunk, if it has come. Raises OSError."""
        blob, health = flight.blob, self._health.of(member)
        start, stop = blob.span_of(flight.chunk)
        resizes, came = blob.resizes, list[ChunkRecord]()
        request = self.request(blob, flight.chunk, member, cached_only=cached_only, lag=lag)
        health.outstanding += stop - start
        try:
            if health.problem is not None and not await self._answers(blob, flight.chunk, member):
                return PeerAnswer(outcome="away"), None
            with spanning(blob, REQUEST, offset=start, bytes=stop - start, member=member):
                extent = Extent(start, stop, blob.fileno(), start, blob.chunk_size)
                answer = await self._copier.fetch_from_peer(request, extent, came.append, priority=flight.priority)
        except TransientStoreError as error:  # the fetch process died
            return PeerAnswer(outcome="busy", detail=str(error)), None
        finally:
            health.outstanding -= stop - start
        self.answered(member, answer)
        self._count(answer, cached_only=cached_only)
        return answer, came[0] if answer.outcome == "ok" and blob.resizes == resizes else None

    async def _answers(self, blob: Blob, chunk: int, member: str) -> bool:
        """Whether a member that has failed answers again: it need not wait for the store to say so.

        Until then, other requests pass it over.
        """
        try:
            answer = await self._copier.ask_peer(self.request(blob, chunk, member, cached_only=True, sends=False))
        except TransientStoreError:  # the fetch process died
            return False
        self.answered(member, answer)
        return self._health.of(member).problem is None

    async def _find_itself(self, blob: Blob, chunk: int) -> None:
        """Ask all members whether they are this host, whose address may be translated on the way to it.

        It must know before it waits for another member, which may wait for it by that address.
        """
        async with self._finding:
            members = self._members.addresses
            if self._members.me is None and self._searched != members:
                self._searched = members
                with trio.move_on_after(FINDING_S):
                    async with trio.open_nursery() as nursery:
                        for member in members - self._health.down():
                            nursery.start_soon(self._answers, blob, chunk, member)

    def answered(self, member: str, answer: PeerAnswer) -> None:
        """Learn from the end of a request."""
        self._health.answered(member, answer)
        if answer.outcome == "self":
            self._members.found(member)

    def request(
        self,
        blob: Blob,
        chunk: int,
        member: str,
        *,
        cached_only: bool = False,
        sends: bool = True,
        lag: float | None = None,
    ) -> PeerRequest:
        """The request to a member for a chunk; without *sends*, the member only fetches it itself."""
        start, stop = blob.span_of(chunk)
        asked = ChunkRequest(
            fleet=self._fleet,
            token=self._content(blob)[1],
            key=blob.generation.file,
            start=start,
            stop=stop,
            asker=self._members.me or "",
            instance=self._members.instance,
            cached_only=cached_only,
        )
        ahead = min(blob.generation.size - start, AHEAD * blob.chunk_size)
        patience_s = self._health.patience_s(max(stop - start, ahead))
        return PeerRequest(
            member=member,
            target=asked.target,
            headers=asked.headers,
            patience_s=patience_s,
            sends=sends,
            lag=lag,
        )

    def _count(self, answer: PeerAnswer, *, cached_only: bool) -> None:
        match answer.outcome:
            case "ok":
                self.counts.received_bytes += answer.received
                self.counts.received_chunks += 1
            case "damaged":
                self.counts.damaged_chunks += 1
            case "slow":
                self.counts.slow_requests += 1
            case "busy":
                self.counts.busy_requests += 1
            case outcome if outcome != "self" and not (cached_only and outcome in {"absent", "other"}):
                self.counts.failed_requests += 1
