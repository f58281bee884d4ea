"""The state that the parts of a disk tier share: directory, index, files, journal, budget and known blobs."""

import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, TypeVarTuple

import trio

from trimsfs.errors import CacheUnusableError, TrimsError
from trimsfs.origins import Origins
from trimsfs.tiers.blob import Blob, OpenFiles
from trimsfs.tiers.disk.blob_files import BlobFiles
from trimsfs.tiers.disk.budget import Budget
from trimsfs.tiers.disk.cache_directory import CacheDirectory
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.index.journal import Journal
from trimsfs.tiers.index.recovery import index_unusable
from trimsfs.tiers.threads import Threads

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@dataclass(slots=True, kw_only=True, eq=False)
class TierState:
    """The state of the disk tier of one *store*, in chunks of *chunk_size* bytes.

    Invariants: ``blobs`` holds every blob with users, the last used one at its end, so a token has at most one Blob.
    A load holds ``lock`` from the look-up in the index until the blob is in ``blobs``; a removal holds it from taking
    the blob out until its file is removed. ``budget`` counts chunks from the moment that space is reserved for them.
    ``unfinished`` are the tokens of blobs with chunks that were reserved and not written. ``removed`` and ``suspected``
    are those of `DiskTier`.
    """

    store: str | Origins
    chunk_size: int
    directory: CacheDirectory
    files: BlobFiles
    threads: Threads
    journal: Journal
    budget: Budget
    removed: Callable[[Blob], None]
    suspected: Callable[[Blob, TrimsError], None]
    blobs: OrderedDict[str, Blob] = field(default_factory=OrderedDict)
    lock: trio.Lock = field(default_factory=trio.Lock)
    unfinished: set[str] = field(default_factory=set)

    @property
    def index(self) -> BlobIndex:
        return self.directory.index

    @property
    def open_files(self) -> OpenFiles:
        return self.files.open_files

    def close(self, blob: Blob) -> None:
        """Forget a blob that nobody uses; its file stays."""
        del self.blobs[blob.token]
        self.removed(blob)
        blob.detach()

    async def ask_index(self, function: Callable[[*Ts], T], *arguments: *Ts) -> T:
        """Call a *function* of the index for a command. Raises CacheUnusableError when the index fails."""
        try:
            return await self.threads.run(function, *arguments)
        except sqlite3.Error as error:
            raise self.index_fails(error) from error

    def index_fails(self, error: sqlite3.Error) -> CacheUnusableError:
        """The error of a caller who cannot do without the index."""
        return index_unusable(self.directory.path / "index.sqlite", error)
