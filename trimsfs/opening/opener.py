"""The opener answers an open of a model file: in passthrough mode, or in cached mode.

The kernel refuses opens of one inode in both modes. So while programs have the inode of a registered file open in
cached mode, others open it in cached mode, too. All of them share the kernel's pages of it.
"""

from trimsfs.errors import ObjectChangedError, StaleHandleError
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.namespace.inodes import Inode
from trimsfs.opening.cold_open import ColdOpener, Interruptible
from trimsfs.opening.passthrough import Passthrough
from trimsfs.opening.reopens import Reopens
from trimsfs.tiers.blob import Blob


class Opener:
    """Makes blobs ready for opens, and counts the opens since the server started."""

    def __init__(self, fetcher: Fetcher, passthrough: Passthrough, cold_opener: ColdOpener, reopens: Reopens) -> None:
        self._fetcher = fetcher
        self.passthrough = passthrough
        self._cold_opener = cold_opener
        self.reopens = reopens
        self.passthrough_opens = self.cached_opens = 0

    async def open(self, inode: Inode, blob: Blob, interruptible: Interruptible, thread: int) -> bool:
        """Return when an open can be answered: whether in passthrough mode. The caller holds the blob, and calls
        `closed` at the end.

        Raises ObjectChangedError if the store has replaced the object, and StaleHandleError if the inode can no longer
        be opened. Raises InterruptedError on a signal to the thread, and as `ColdOpener.wait` and `ColdOpener.fetch`.
        """
        if inode.replaced and not blob.complete:
            raise ObjectChangedError(f"{inode.path}: replaced in the store: open it again")
        self._fetcher.hold(blob)
        try:
            with self.reopens.under_way(thread, inode.path):
                passed = await self._passable(inode, blob, interruptible) and not inode.cached
            blob.health.check()
            if inode.passed and not passed:
                self._lost(inode, thread)
        except BaseException:
            self._fetcher.unhold(blob)
            raise
        if passed:
            self._fetcher.unhold(blob)
            self.opened(inode, blob)
        else:
            inode.cached += 1
            self.cached_opens += 1
        return passed

    def _lost(self, inode: Inode, thread: int) -> None:
        """Have a name lead to another inode while programs have a local file open that was lost, as by a new cache."""
        inode.lost = True
        self.reopens.request(thread, inode.path)
        raise StaleHandleError(f"{inode.path}: programs have a local file of it open that was lost")

    async def _passable(self, inode: Inode, blob: Blob, interruptible: Interruptible) -> bool:
        """Whether the kernel can read the blob by itself, after the wait that this takes."""
        if self.passthrough.ready(blob):
            return True
        if blob.backing_id and not inode.cached:  # it has left the memory
            return await self._cold_opener.fetch(blob, interruptible)
        return await self._cold_opener.wait(blob, interruptible, shared=inode.cached > 0)

    def ready(self, inode: Inode, blob: Blob) -> bool:
        """Whether an open can be answered at once in passthrough mode, with `opened`."""
        return not inode.cached and self.passthrough.ready(blob) and not blob.health.quarantined

    def opened(self, inode: Inode, blob: Blob) -> None:
        """Count an open in passthrough mode of a blob that the caller holds; `closed` ends it."""
        inode.passed += 1
        blob.passed += 1
        self.passthrough.used(blob)
        self.passthrough_opens += 1

    def restore(self, inode: Inode, blob: Blob, *, passed: bool) -> None:
        """Take over a file that an earlier server opened, in passthrough mode if *passed*."""
        if passed:
            inode.passed += 1
            blob.passed += 1
        else:
            inode.cached += 1
            self._fetcher.hold(blob)

    def closed(self, inode: Inode, blob: Blob, *, passed: bool) -> None:
        """End what `open`, `opened` or `restore` began."""
        if passed:
            inode.passed -= 1
            blob.passed -= 1
            inode.lost = inode.lost and inode.passed > 0
        else:
            inode.cached -= 1
            self._fetcher.unhold(blob)
