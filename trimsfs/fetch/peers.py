"""Peers: other hosts of a fleet, which a fetcher may ask for chunks before it asks the store."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from trimsfs.fetch.flights import Flight, Lane
from trimsfs.stores.base import Sink
from trimsfs.tiers.blob import Blob

Outcome = Literal[
    "ok", "absent", "other", "busy", "away", "refused", "damaged", "slow", "silent", "unreachable", "self"
]
"""How a request to a peer ended: ``ok`` if it sent the chunks, or has them if none were to be sent. The others, in
order: it has no such chunks, or another generation. It is too busy, or drained. It refuses this host's certificate. The
bytes differ from their checksum, or come too slowly. It stays silent, or cannot be reached. It is this very host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRequest:
    """A request to a member of the fleet, by address. Without *sends*, the member only fetches the chunks itself.

    The body may take *patience_s* seconds: one that comes too slowly is given up before. So is one of which the rest
    would take more than *lag* times as long as a whole one from other members.
    """

    member: str
    target: str
    headers: Mapping[str, str]
    patience_s: float
    sends: bool = True
    lag: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAnswer:
    """How a request ended. ``detail`` tells why, ``holders`` who has the chunks.

    ``waited_s`` is the time until the first byte of the body, ``body_s`` the time from then on, for ``received`` bytes.
    """

    outcome: Outcome
    detail: str = ""
    holders: Sequence[str] = ()
    waited_s: float = 0.0
    body_s: float = 0.0
    received: int = 0


class Peers(Protocol):
    """Fetches chunks from other hosts."""

    def hosts(self) -> int:
        """How many hosts fetch from the store for each other, with this one."""

    def lane(self, blob: Blob, chunk: int) -> Lane:
        """Where a chunk most likely comes from."""

    async def fetch(self, flight: Flight, *, deadline: float, away: Callable[[], bool]) -> bool:
        """Fetch a chunk into its blob; returns whether it is there. If not, the store is to be asked.

        Asks each owner once, and busy ones again a few times, but not while this host's store is *away*. After the
        *deadline*, it asks them only for what they have.
        """


class PeerReader(Protocol):
    """Reads from peers, in a fetch process."""

    async def read(self, request: PeerRequest, length: int, begin: Callable[[Sequence[int]], Sink]) -> PeerAnswer:
        """Make a request for *length* bytes, which the sink gets that *begin* makes of the checksums of the chunks.

        Raises what *begin* and the sink do.
        """

    async def ask(self, request: PeerRequest) -> PeerAnswer:
        """Make a request for no bytes."""
