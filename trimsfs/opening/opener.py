"""How an open of a model file is answered: passed through, served by the server, or ESTALE for a reopen.

The number of an inode decides between the first two, so that the kernel never meets one inode opened both ways. An open
by a number that the name no longer leads to is answered ESTALE: the kernel looks the name up and opens what it finds.
It does so only once, so the reopen is served by whatever number it comes. So is an open of a file that is bind-mounted,
to which no lookup leads.
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
        """Return when an open by this inode can be answered; the caller uses the blob, and ends with `closed`.

        Raises LookUpAgainError for a reopen, ObjectChangedError when the store has replaced the object,
        InterruptedError for a signal to the thread, and as `ColdOpener.wait` and `ColdOpener.fetch`.
        """
        if inode.passthrough:
            await self._open_passed_through(inode, blob, interruptible, thread)
        else:
            await self._open_cached(inode, blob, interruptible, thread)

    async def _open_passed_through(self, inode: Inode, blob: Blob, interruptible: Interruptible, thread: int) -> None:
        """What was evicted since the kernel learnt the number is fetched again."""
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
        """Whether an open by a number that is passed through can be answered at once, by `opened`."""
        return self.passthrough.ready(blob) and not blob.health.quarantined

    def opened(self, blob: Blob) -> None:
        """An open of a blob, which the caller uses, is passed through; it ends with `closed`."""
        blob.passed += 1
        self.passthrough.used(blob)
        self.passthrough_opens += 1

    async def _open_cached(self, inode: Inode, blob: Blob, interruptible: Interruptible, thread: int) -> None:
        """Raises LookUpAgainError when the blob is passed through by now, and so has another number."""
        if inode.replaced and not blob.complete:
            raise ObjectChangedError(f"{inode.path} has been replaced in the store")
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
        """A file is open since before this server was started."""
        if inode.passthrough:
            blob.passed += 1
        else:
            self._fetcher.hold(blob)

    def closed(self, inode: Inode, blob: Blob) -> None:
        """The opposite of `open` and `restore`."""
        if inode.passthrough:
            blob.passed -= 1
        else:
            self._fetcher.unhold(blob)
