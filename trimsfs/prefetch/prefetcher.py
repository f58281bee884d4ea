"""The prefetcher: opens and listings trigger fetches of sibling files and of the rest of a model."""

import os
from typing import Literal

import trio

from trimsfs.fetch.fetcher import Fetcher
from trimsfs.namespace.inodes import Inode, InodeKind
from trimsfs.namespace.listing import CONTROL_NAME
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.passthrough import Passthrough
from trimsfs.origins import ByPath
from trimsfs.prefetch.account import Account, PrefetchStatistics
from trimsfs.prefetch.directory_readahead import Readable
from trimsfs.prefetch.model_readahead import ModelReadahead
from trimsfs.prefetch.related_files import describes
from trimsfs.prefetch.siblings import Siblings
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.interfaces import BlobUse, Room
from trimsfs.tiers.index.load_records import LoadRecords

Prefetch = Literal["auto", "off", "directory"]
_CONTROL = f"{CONTROL_NAME.decode()}/"
"""Part of the keys of derived blobs, which come from no store."""


class Prefetcher:
    """Hears of opens, closes and listings, and fetches the files that likely come next."""

    def __init__(
        self,
        namespace: Namespace,
        blobs: BlobUse,
        room: Room,
        loads: LoadRecords,
        fetcher: Fetcher,
        passthrough: Passthrough,
        breaker: CircuitBreaker | ByPath[CircuitBreaker],
        *,
        mode: Prefetch,
        chunk_size: int,
    ) -> None:
        self._account = Account()
        self._siblings = Siblings(namespace, blobs, room, fetcher, passthrough, self._account, chunk_size=chunk_size)
        self._models = ModelReadahead(
            namespace, blobs, room, loads, fetcher, self._account, breaker, whole_directories=mode == "directory"
        )
        self._mode: Prefetch = mode

    def statistics(self) -> PrefetchStatistics:
        return self._account.statistics()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Prefetch in the background until the server stops."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._siblings.run)
            await nursery.start(self._models.run)
            task_status.started()

    def record_open(self, blob: Blob, readable: Readable) -> None:
        """Record the beginning of an open by a user who may read the *readable* files.

        Then call `open_failed`, or `closed` when the handle is released; before that, `opened` if the open had to wait.
        """
        self._account.opened(blob.token)
        if self._mode == "off" or _CONTROL in blob.generation.key:
            return
        small = blob.generation.size <= self._siblings.small
        if small:
            self._siblings.record_open(blob.generation, readable, here=blob.complete)
        if not small or self._mode == "directory" or describes(os.fsencode(blob.generation.key)):
            self._models.record_open(blob, readable, small=small)
        self._models.open_begun(blob)

    def opened(self, blob: Blob) -> None:
        """Record that an open has succeeded."""
        self._models.opened(blob)

    def open_failed(self, blob: Blob) -> None:
        """Record that an open has failed."""
        self._models.open_failed(blob)

    def closed(self, blob: Blob) -> None:
        """Record a released handle."""
        self._models.closed(blob)

    def record_listing(self, inode: Inode, readable: Readable) -> None:
        """Record a listing by a user who may read the *readable* files."""
        if self._mode != "off" and inode.kind is InodeKind.DIRECTORY:
            self._siblings.record_listing(inode.path, readable)

    def removed(self, blob: Blob) -> None:
        """Record that a blob leaves the disk, or is closed because nobody has used it for long."""
        self._account.gone(blob.token)
        self._siblings.forget(blob.generation)
