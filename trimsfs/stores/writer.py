"""The protocol by which the publisher's commands write to a store: what is there is only replaced on a condition."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

PART_SIZE = 16 << 20
"""Bytes of a part of a large file, which is also the size from which a file is uploaded in parts."""
MOST_PARTS = 10_000
"""Most parts of a file, as in S3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """An object in a store. ``sha256`` is the hexadecimal digest of its content, if the store tells it."""

    key: str
    size: int
    etag: str
    sha256: str | None = None


class Upload(Protocol):
    """A large object on its way into the store, part by part; nobody sees it before `complete`."""

    part_size: int
    """Bytes of each part but the last, a multiple of 1 MiB."""

    async def put_part(self, number: int, data: bytes) -> bool:
        """Write part *number*, from 0 on; parts may be written at the same time.

        Returns False if an earlier upload has left this part with this content. Raises ObjectChangedError when somebody
        else has ended this upload.
        """

    async def complete(self) -> None:
        """Make the object of all parts. Raises ObjectChangedError when there is one by that key, and as `put_part`."""


class Writer(Protocol):
    """Writes objects of a store. Methods may raise what those of `Store` raise; they retry transient failures.

    Keys are relative to the store's own prefix. What a call wrote is on stable storage when the call returns. A call
    that raises ObjectChangedError may have made the object itself, if the answer to its first attempt was lost.
    """

    @property
    def location(self) -> str:
        """The store, for messages."""

    async def find(self, key: str) -> Stored | None:
        """An object, with its SHA-256 if that can be known; None if there is none."""

    async def read(self, key: str) -> tuple[bytes, str] | None:
        """Content and ETag of a small object; None if there is none. Raises StoreUnavailableError if it is large."""

    async def age(self, key: str) -> timedelta | None:
        """How long ago an object was written, by the store's clock; None without one, or if the store tells no time."""

    def list(self, prefix: str) -> AsyncIterator[Stored]:
        """All objects whose keys begin with *prefix*, which ends in ``/``, in any order."""

    def directories(self, prefix: str) -> AsyncIterator[str]:
        """The names of the directories right below *prefix*, which ends in ``/``, in any order. Some may be empty."""

    async def put_if_absent(self, key: str, data: bytes, *, sha256: str | None = None) -> None:
        """Make an object. Raises ObjectChangedError when there is one. *sha256* is what `find` tells of it later."""

    async def put_if_match(self, key: str, data: bytes, etag: str) -> None:
        """Replace the object that has this ETag. Raises ObjectChangedError when there is another, or none."""

    async def upload(self, key: str, size: int, sha256: str) -> Upload:
        """Begin to upload an object in parts, or go on where an earlier upload of the same key and size ended."""

    async def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that do not exist are no error."""

    async def discard_uploads(self, prefix: str) -> None:
        """Discard what unfinished uploads of keys that begin with *prefix* have left in the store."""

    async def aclose(self) -> None:
        """Release connections and threads."""


def part_size(size: int) -> int:
    """The part size of an object of *size* bytes: the same for each upload of it."""
    mib = 1 << 20
    return max(PART_SIZE, -(-size // MOST_PARTS // mib) * mib)
