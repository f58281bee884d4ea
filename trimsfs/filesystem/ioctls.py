"""Ioctls of open files: their residency and state, and those of extras."""

from trimsfs.control.control_files import Control
from trimsfs.control.extra import IoctlRequest
from trimsfs.errors import InvalidRequestError, NoSuchEntryError
from trimsfs.filesystem.handles import Handles
from trimsfs.filesystem.trust import Trust
from trimsfs.namespace.inodes import InodeKind, Inodes
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.disk.interfaces import Residencies

IS_VERIFIED, IS_PASSTHROUGH, IS_PINNED, TELLS_COMMON = 1, 2, 4, 8
"""Flags of ``trimsfs.h``."""
UNKNOWN = (1 << 64) - 1


class Ioctls:
    """Answers ioctls; `closed` ends what a program began through an open file."""

    def __init__(
        self,
        inodes: Inodes,
        residencies: Residencies,
        control: Control,
        passthrough: Passthrough,
        trust: Trust,
        handles: Handles,
    ) -> None:
        self._inodes = inodes
        self._residencies = residencies
        self._control = control
        self._of_extras = {number: answer for extra in control.extras for number, answer in extra.ioctls.items()}
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
        here = await self._residencies.of(inode.generation)
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

    def known(self, command: int) -> bool:
        """Whether an extra answers an ioctl."""
        return command in self._of_extras

    async def answer(self, command: int, handle: int, uid: int, pid: int, data: bytes) -> bytes:
        """The answer of an extra to an ioctl of an open file. Raises TrimsError."""
        file = self._handles.files.get(handle)
        if file is None:
            raise InvalidRequestError("not a model's file")
        await self._trust.wait(file.blob)
        request = IoctlRequest(
            handle=handle,
            generation=file.blob.generation,
            derived=bool(file.inode.control),
            uid=uid,
            pid=pid,
            data=data,
        )
        answer = await self._of_extras[command](request)
        if handle not in self._handles.files:
            self.closed(handle)  # meanwhile
        return answer

    def closed(self, handle: int) -> None:
        """End what began through a closed file."""
        for extra in self._control.extras:
            extra.closed(handle)
