"""Ioctls of an open file: what of it is here, what programs have derived from it, copies of it on GPUs."""

from trimsfs.control.control_files import Control
from trimsfs.errors import InvalidRequestError, NoSuchEntryError
from trimsfs.filesystem.handles import Handles
from trimsfs.filesystem.trust import Trust
from trimsfs.gpu.copy_requests import MemoryKind
from trimsfs.gpu.interface import IoctlAnswer
from trimsfs.models.derived_blobs import DerivedBlobs, Piece
from trimsfs.namespace.inodes import InodeKind, Inodes
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.disk.tier import DiskTier

IS_VERIFIED, IS_PASSTHROUGH, IS_PINNED, TELLS_COMMON = 1, 2, 4, 8
"""Flags of ``trimsfs.h``."""
UNKNOWN = (1 << 64) - 1


class Ioctls:
    """Answers ioctls; `closed` ends what was begun through an open file."""

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
        """How much of a file is here: its size, bytes on disk, bytes in memory and flags, as in ``trimsfs.h``."""
        inode = self._inodes[number]
        if inode.kind is not InodeKind.OBJECT or inode.generation is None:
            raise NoSuchEntryError(f"{inode.path} is no model file")
        here = await self._disk.residency(inode.generation)
        host = UNKNOWN if here.host_bytes is None else here.host_bytes
        flags = (
            (IS_VERIFIED if here.verified else 0)
            | (IS_PASSTHROUGH if self._passthrough.has(inode.generation) else 0)
            | (IS_PINNED if here.pinned else 0)
        )
        return inode.generation.size, here.disk_bytes, host, flags

    def state(self, handle: int) -> int:
        """Whether every byte of an open file is here and verified, and whether the mount has control files of what it
        has in common with others: flags as in ``trimsfs.h``."""
        file = self._handles.files.get(handle)
        verified = IS_VERIFIED if file is not None and file.blob.complete else 0
        return verified | (TELLS_COMMON if self._control.tells_common else 0)

    async def derive(self, handle: int, piece: Piece) -> None:
        """Take a piece of what was made of an open file. Raises as `DerivedBlobs.take`."""
        file = self._handles.files.get(handle)
        if file is None or file.inode.control:
            raise InvalidRequestError("not a model's file")
        await self._derived.take(file.blob.generation, handle, piece)

    async def lend(self, handle: int, uid: int, pid: int, device: str, memory: MemoryKind) -> IoctlAnswer:
        """Load a copy of an open file to a GPU, and keep it for as long as the file is open."""
        file = self._handles.files.get(handle)
        if file is None:
            raise InvalidRequestError("not a model's file")
        await self._trust.wait(file.blob)
        lent = await self._control.gpu.lend(file.blob.generation, handle, uid, pid, device, memory)
        if handle not in self._handles.files:  # it has been closed meanwhile
            self._control.gpu.closed(handle)
        return lent

    def closed(self, handle: int) -> None:
        """A file has been closed: what comes through it is not kept, and its copies on GPUs are given back."""
        self._derived.closed(handle)
        self._control.gpu.closed(handle)
