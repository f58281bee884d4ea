"""Residency: how much of a generation is on the disk and in memory of this host."""

from dataclasses import dataclass
from pathlib import Path

from trimsfs.tiers.blob import Blob
from trimsfs.tiers.host.page_cache import resident_bytes
from trimsfs.tiers.index.blob_record import BlobRecord
from trimsfs.types import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class Residency:
    """What of a generation is here: ``disk_bytes`` in the blob, ``host_bytes`` in the page cache (None: unknown).

    ``verified`` says that every byte is here, has been checked since the server started, and that all of them have the
    ``digest`` of the store, None before they were compared and empty where it has none; ``handles`` counts those that
    are open, ``users`` commands and fetches as well, ``uses`` all opens ever, ``last_used`` is in seconds since the
    epoch.
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
    """Put together what the index, the server and the page cache know; *path* is the blob's file."""
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
