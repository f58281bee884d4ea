"""Takeover: a server goes on with the files that the kernel had open before the server started."""

from trimsfs.control.control_files import Control
from trimsfs.filesystem.files import Files
from trimsfs.filesystem.handles import Handles, OpenFile, passed_through
from trimsfs.namespace.inodes import InodeKind, Inodes
from trimsfs.opening.opener import Opener
from trimsfs.tiers.disk.disk_tier import DiskTier


class Takeover:
    """Restores open files from the ledger, and sorts out the opens that the kernel sends again."""

    def __init__(
        self, inodes: Inodes, disk: DiskTier, control: Control, opener: Opener, handles: Handles, files: Files
    ) -> None:
        self._inodes = inodes
        self._disk = disk
        self._control = control
        self._opener = opener
        self._handles = handles
        self._files = files

    async def restore(self) -> None:
        """Take over everything that is open. Runs before the first request is answered."""
        self._opener.reopens.restore()
        found = self._handles.restore(self._inodes, self._control.restored)
        files = {handle: inode for handle, inode in found.items() if inode.kind is InodeKind.OBJECT}
        blobs = await self._disk.recall([inode.generation for inode in files.values() if inode.generation is not None])
        for (handle, inode), blob in zip(files.items(), blobs, strict=True):
            self._handles.files[handle] = OpenFile(inode, blob)
            blob.users += 1
            blob.handles += 1
            self._opener.restore(inode, blob, passed=passed_through(handle))
            for extra in self._control.extras:
                extra.restore_file(handle)
        for extra in self._control.extras:
            extra.all_restored()

    def resent(self, request: int) -> None:
        """Release the handle that an earlier server made for an open that the kernel sends again: nobody has it."""
        handle = self._handles.resent(request)
        if handle is not None:
            self._files.release(handle)

    def all_resent(self) -> None:
        """Confirm all other handles: the kernel has sent again every open without an answer."""
        self._handles.all_resent()
