"""Ioctls of open files: residency, derived blobs and copies on GPUs."""

from trimsfs.control.control_files import Control
from trimsfs.errors import InvalidRequestError, NoSuchEntryError
from trimsfs.extras.folding.derived_blobs import DerivedBlobs, Piece
from trimsfs.extras.gpu.copy_requests import MemoryKind
from trimsfs.extras.gpu.interface import IoctlAnswer
from trimsfs.filesystem.handles import Handles
from trimsfs.filesystem.trust import Trust
from trimsfs.namespace.inodes import InodeKind, Inodes
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.disk.tier import DiskTier

IS_VERIFIED, IS_PASSTHROUGH, IS_PINNED, TELLS_COMMON = 1, 2, 4, 8
"""Flags of ``trimsfs.h``."""
UNKNOWN = (1 << 64) - 1


class Ioctls:
    """Answers ioctls; `closed` ends what a program began through an open file."""

    def __init__(
        self,
        inodes: Inodes,
        disk: DiskTier,
        control: Control,
        derived: DerivedBlobs,
        passthrough: Passthrough,
        trust: Trust,
        handles: Handles,
    ) -> None:
        self._inodes = inodes
        self._disk = disk
        self._control = control
        self._derived = derived
        self._passthrough = passthrough
        self._trust = trust
        self._handles = handles

    async def residency(self, number: int) -> tuple[int, int, int, int]:
        """A file's residency, as in ``trimsfs.h``: its size, bytes on disk, bytes in memory, and flags.

        Raises NoSuchEntryError for anything but a model file.
        """
        inode = self._inodes[number]
        if inode.kind is not InodeKind.OBJECT or inode.generation is None:
            raise NoSuchEntryError(f"{inode.path} is not a model file")
        here = await self._disk.residency(inode.generation)
        host = UNKNOWN if here.host_bytes is None else here.host_bytes
        flags = (
            (IS_VERIFIED if here.verified else 0)
            | (IS_PASSTHROUGH if self._passthrough.has(inode.generation) else 0)
            | (IS_PINNED if here.pinned else 0)
        )
        return inode.generation.size, here.disk_bytes, host, flags

    def state(self, handle: int) -> int:
        """Flags as in ``trimsfs.h``: whether all of an open file is here and verified, and whether control files tell
        which blocks files share."""
        file = self._handles.files.get(handle)
        verified = IS_VERIFIED if file is not None and file.blob.complete else 0
        return verified | (TELLS_COMMON if self._control.tells_common else 0)

    async def derive(self, handle: int, piece: Piece) -> None:
        """Take a piece of a blob derived from an open file. Raises as `DerivedBlobs.take`."""
        file = self._handles.files.get(handle)
        if file is None or file.inode.control:
            raise InvalidRequestError("not a model's file")
        await self._derived.take(file.blob.generation, handle, piece)

    async def lend(self, handle: int, uid: int, pid: int, device: str, memory: MemoryKind) -> IoctlAnswer:
        """Load a copy of an open file to a GPU, and lease it until the file is closed."""
        file = self._handles.files.get(handle)
        if file is None:
            raise InvalidRequestError("not a model's file")
        await self._trust.wait(file.blob)
        lent = await self._control.gpu.lend(file.blob.generation, handle, uid, pid, device, memory)
        if handle not in self._handles.files:  # closed meanwhile
            self._control.gpu.closed(handle)
        return lent

    def closed(self, handle: int) -> None:
        """End what began through a closed file: drop incomplete derived blobs, end its leases of GPU copies."""
        self._derived.closed(handle)
        self._control.gpu.closed(handle)
