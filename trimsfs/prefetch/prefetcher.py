"""What opens and listings bring ahead: the small files beside one, and the rest of a model."""

import os
from typing import Literal

import trio

from trimsfs.fetch.fetcher import Fetcher
from trimsfs.namespace.inodes import Inode, InodeKind
from trimsfs.namespace.listing import CONTROL_NAME
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.passthrough import Passthrough
from trimsfs.prefetch.account import Account, PrefetchStatistics
from trimsfs.prefetch.directory_readahead import Readable
from trimsfs.prefetch.load_order import describes
from trimsfs.prefetch.model_readahead import ModelReadahead
from trimsfs.prefetch.siblings import Siblings
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.disk.tier import DiskTier

Prefetch = Literal["auto", "off", "directory"]
_CONTROL = f"{CONTROL_NAME.decode()}/"
"""In the keys of derived blobs, which come from no store."""


class Prefetcher:
    """Hears what programs open, close and list, and has the files fetched that come next."""

    def __init__(
        self,
        namespace: Namespace,
        disk: DiskTier,
        fetcher: Fetcher,
        passthrough: Passthrough,
        breaker: CircuitBreaker,
        *,
        mode: Prefetch,
    ) -> None:
        self._account = Account()
        self._siblings = Siblings(namespace, disk, fetcher, passthrough, self._account)
        self._models = ModelReadahead(
            namespace, disk, fetcher, self._account, breaker, whole_directories=mode == "directory"
        )
        # What nobody has open has to last until somebody opens it.
        self._mode: Prefetch = mode if disk.keeps_idle else "off"

    def statistics(self) -> PrefetchStatistics:
        return self._account.statistics()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Prefetch in the background, for as long as the server runs."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self._siblings.run)
            await nursery.start(self._models.run)
            task_status.started()

    def record_open(self, blob: Blob, readable: Readable) -> None:
        """A file is opened by somebody who may read what is *readable*."""
        self._account.opened(blob.token)
        if self._mode == "off" or _CONTROL in blob.generation.key:
            return
        small = blob.generation.size <= self._siblings.small
        if small:
            self._siblings.record_open(blob.generation, readable, here=blob.complete)
        if not small or self._mode == "directory" or describes(os.fsencode(blob.generation.key)):
            self._models.record_open(blob, readable, small=small)

    def opened(self, blob: Blob) -> None:
        """A program has got a handle of a file."""
        self._models.opened(blob)

    def closed(self, blob: Blob) -> None:
        """A handle of a file is given back."""
        self._models.closed(blob)

    def record_listing(self, inode: Inode, readable: Readable) -> int:
        """A directory is listed by somebody who may read what is *readable*: the bytes up to which files of it are
        about to come."""
        if self._mode == "off" or inode.kind is not InodeKind.DIRECTORY:
            return 0
        return self._siblings.small if self._siblings.record_listing(inode.path, readable) else 0

    def removed(self, blob: Blob) -> None:
        """A blob leaves the disk, or is closed as nobody has used it for long."""
        self._account.gone(blob.token)
        self._siblings.forget(blob.generation)
