"""Residency: how much of a generation is on this host's disk and in its memory."""

from dataclasses import dataclass
from pathlib import Path

from trimsfs.tiers.blob import Blob
from trimsfs.tiers.host.page_cache import resident_bytes
from trimsfs.tiers.index.index import BlobRecord
from trimsfs.types import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """How much of a generation is here: ``disk_bytes`` in the blob, ``host_bytes`` in the page cache (None: unknown).

    ``verified``: every byte is here, was verified since the server started, and matches the store's ``digest``. The
    digest is None if not compared yet, and empty without one to compare with. ``handles`` counts open handles;
    ``users`` includes commands and fetches; ``uses`` counts all opens ever. ``last_used``: seconds since the epoch.
    """

    generation: Generation
    token: str
    disk_bytes: int
    host_bytes: int | None
    verified: bool
    digest: str | None
    pinned: bool
    handles: int
    users: int
    uses: int
    last_used: float


def residency_of(record: BlobRecord, blob: Blob | None, path: Path) -> Residency:
    """The residency from index record, known blob and page cache; *path* is the blob's file."""
    try:
        with path.open("rb") as file:
            host_bytes = resident_bytes(file.fileno())
    except OSError:
        host_bytes = 0
    return Residency(
        generation=record.generation,
        token=record.token,
        disk_bytes=record.bytes,
        host_bytes=host_bytes,
        verified=blob is not None and blob.verified,
        digest=record.digest if blob is None else blob.health.digest,
        pinned=record.pinned,
        handles=blob.handles if blob is not None else 0,
        users=blob.users if blob is not None else 0,
        uses=record.uses,
        last_used=record.last_used,
    )
