"""The opener answers an open of a model file: in passthrough mode, in cached mode, or with ESTALE for a reopen.

The inode number decides the mode, so that the kernel never sees one inode opened in both. If the name now has another
number, the server answers ESTALE: the kernel looks the name up and opens what it finds. The kernel does so only once,
so the server answers a reopen in the mode of whatever number it comes with. A reopen of a bind-mounted file comes with
the old number, as no lookup reaches that file.
"""

from trimsfs.errors import LookUpAgainError, ObjectChangedError
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

    async def open(self, inode: Inode, blob: Blob, interruptible: Interruptible, thread: int) -> None:
        """Return when an open by this inode can be answered. The caller holds the blob, and calls `closed` at the end.

        Raises LookUpAgainError to get a reopen, ObjectChangedError if the store has replaced the object,
        InterruptedError on a signal to the thread, and as `ColdOpener.wait` and `ColdOpener.fetch`.
        """
        if inode.passthrough:
            await self._open_passed_through(inode, blob, interruptible, thread)
        else:
            await self._open_cached(inode, blob, interruptible, thread)

    async def _open_passed_through(self, inode: Inode, blob: Blob, interruptible: Interruptible, thread: int) -> None:
        """Open by a passthrough number. Refetches a blob that was evicted since the kernel learnt the number."""
        if not self.passthrough.ready(blob):
            if not blob.backing_id and self.reopens.request(thread, inode.path):
                raise LookUpAgainError(inode.path)
            with self.reopens.under_way(thread, inode.path):
                if not await self._cold_opener.fetch(blob, interruptible):
                    blob.health.check()
                    raise LookUpAgainError(inode.path)
        blob.health.check()
        self.opened(blob)

    def ready(self, blob: Blob) -> bool:
        """Whether an open by a passthrough number can be answered at once, with `opened`."""
        return self.passthrough.ready(blob) and not blob.health.quarantined

    def opened(self, blob: Blob) -> None:
        """Count an open in passthrough mode of a blob that the caller holds; `closed` ends it."""
        blob.passed += 1
        self.passthrough.used(blob)
        self.passthrough_opens += 1

    async def _open_cached(self, inode: Inode, blob: Blob, interruptible: Interruptible, thread: int) -> None:
        """Open in cached mode. Raises LookUpAgainError if the blob is registered by now: it has another number then."""
        if inode.replaced and not blob.complete:
            raise ObjectChangedError(f"{inode.path}: replaced in the store: open it again")
        self._fetcher.hold(blob)
        try:
            with self.reopens.under_way(thread, inode.path):
                registered = blob.backing_id != 0 or await self._cold_opener.wait(blob, interruptible)
            blob.health.check()
            if registered and self.reopens.request(thread, inode.path, keep=blob):
                raise LookUpAgainError(inode.path)
        except BaseException:
            self._fetcher.unhold(blob)
            raise
        self.cached_opens += 1

    def restore(self, inode: Inode, blob: Blob) -> None:
        """Take over a file that an earlier server opened."""
        if inode.passthrough:
            blob.passed += 1
        else:
            self._fetcher.hold(blob)

    def closed(self, inode: Inode, blob: Blob) -> None:
        """End what `open`, `opened` or `restore` began."""
        if inode.passthrough:
            blob.passed -= 1
        else:
            self._fetcher.unhold(blob)
