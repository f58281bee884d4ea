"""What opens and listings bring ahead: the small files beside one, and the rest of a model."""

from typing import Literal

import trio

from trimsfs.namespace.inodes import Inode, InodeKind
from trimsfs.prefetch.account import Account, PrefetchStatistics
from trimsfs.prefetch.directory_readahead import Readable
from trimsfs.prefetch.siblings import Siblings
from trimsfs.tiers.blob import Blob

Prefetch = Literal["auto", "off", "directory"]


class Prefetcher:
    """Hears what programs open, close and list, and has the files fetched that come next."""

    def __init__(self, siblings: Siblings, account: Account, *, mode: Prefetch) -> None:
        self._siblings = siblings
        self._account = account
        self._mode = mode

    def statistics(self) -> PrefetchStatistics:
        return self._account.statistics()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Prefetch in the background, for as long as the server runs."""
        await self._siblings.run(task_status)

    def record_open(self, blob: Blob, readable: Readable) -> None:
        """A file is opened by somebody who may read what is *readable*."""
        self._account.opened(blob.token)
        if self._mode != "off" and blob.generation.size <= self._siblings.small:
            self._siblings.record_open(blob.generation, readable, here=blob.complete)

    def record_listing(self, inode: Inode, readable: Readable) -> None:
        """A directory is listed by somebody who may read what is *readable*."""
        if self._mode != "off" and inode.kind is InodeKind.DIRECTORY:
            self._siblings.record_listing(inode.path, readable)

    def removed(self, blob: Blob) -> None:
        """A blob leaves the disk, or is closed as nobody has used it for long."""
        self._account.gone(blob.token)
        self._siblings.forget(blob.generation)
