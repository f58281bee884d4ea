"""The control surface: extended attributes and control files, by name.

Reading an attribute or an ``info`` file only looks. A command file acts: opening it starts the command, each
read gives the next line of JSON on how far it has come, closing it ends the command. So a command dies with the
process that gave it, and needs nothing but the path.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from trimsfs.control.authorisation import Authorisation, Caller
from trimsfs.control.commands import Commands
from trimsfs.control.handle import ControlHandle, Text
from trimsfs.control.reports import Reports
from trimsfs.errors import NotPermittedError
from trimsfs.gpu.interface import DIRECTORY as GPU_DIRECTORY
from trimsfs.gpu.interface import GpuInterface, LeaseFile
from trimsfs.models.tensor_tables import TensorTables
from trimsfs.namespace.inodes import Inode, InodeKind
from trimsfs.tiers.disk.residency import Residency
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Generation

log = logging.getLogger(__name__)

XATTR_PREFIX = "user.trims."
XATTR_LIMIT = 65536
"""Bytes of the longest value that the kernel passes on."""
SUBJECT = "subject"
"""Marks the inode of ``.trims/NAME``, as against ``.trims`` itself."""


class Control:
    """Answers for everything under ``.trims`` and ``user.trims.*``.

    ``tells_common`` tells whether there are files that tell what a model has in common with another.
    """

    def __init__(
        self,
        disk: DiskTier,
        tables: TensorTables,
        commands: Commands,
        gpu: GpuInterface,
        reports: Reports,
        authorisation: Authorisation,
        *,
        tells_common: bool,
    ) -> None:
        self._disk = disk
        self._tables = tables
        self._commands = commands
        self.gpu = gpu
        self._reports = reports
        self.authorisation = authorisation
        self.tells_common = tells_common
        self._root_files: dict[str, Callable[[Caller], Awaitable[bytes]]] = {
            "control": reports.mount,
            "gpu": reports.gpu_copies,
            "metrics": reports.metrics,
            "models": partial(reports.models, ""),
        }
        # At once, without a look at what is here.
        self._identity_xattrs: dict[str, Callable[[Generation], str]] = {
            "etag": lambda generation: generation.etag,
            "generation": lambda generation: generation.token(disk.store),
        }
        self._xattrs: dict[str, Callable[[Residency], str]] = {
            "digest": lambda here: here.digest or "",
            "pinned": lambda here: _boolean(here.pinned),
            "residency": lambda here: json.dumps(reports.residency(here)),
            "verified": lambda here: _boolean(here.verified),
        }

    def names(self, inode: Inode) -> list[str]:
        """The names of the control files in a control directory."""
        if inode.control == SUBJECT:
            looks = ["info"] if inode.generation is None else ["info", "tensors"]
            if self.tells_common and inode.generation is not None:
                looks.append("shared")
            if self.gpu.devices() and inode.generation is not None:
                looks.append(GPU_DIRECTORY)
            return sorted([*looks, *self._commands.names()])
        if inode.control == GPU_DIRECTORY:
            return self.gpu.devices()
        return sorted(self._root_files) if not inode.path else []

    def find(self, inode: Inode, name: str) -> tuple[InodeKind, str] | None:
        """What a name in a control directory is: its kind, and what its inode is told apart by; None for no such name.

        Not all that can be asked for by name is among the `names`.
        """
        if inode.control == GPU_DIRECTORY:
            return (InodeKind.CONTROL_FILE, f"{GPU_DIRECTORY}/{name}") if self.gpu.knows(name) else None
        if inode.control == SUBJECT and inode.generation is not None and name == GPU_DIRECTORY:
            return InodeKind.CONTROL_DIRECTORY, GPU_DIRECTORY
        known = name in self.names(inode) or (inode.control == SUBJECT and self._commands.knows(name))
        return (InodeKind.CONTROL_FILE, name) if known else None

    def xattr_names(self, inode: Inode) -> list[str]:
        """The full names of an inode's attributes."""
        names = [*self._identity_xattrs, *self._xattrs]
        return [XATTR_PREFIX + name for name in names] if inode.kind is InodeKind.OBJECT else []

    async def xattr(self, inode: Inode, name: str, caller: Callable[[], Caller]) -> bytes | None:
        """The value of an attribute by its full name; None when there is no such attribute.

        That of the tensor table, which may have to be fetched, is not among the `xattr_names`.
        """
        generation, short = inode.generation, name.removeprefix(XATTR_PREFIX)
        if short == name or generation is None or inode.kind is not InodeKind.OBJECT:
            return None
        if short == "tensors":
            table = await self._tables.table(generation)
            return table if len(table) <= XATTR_LIMIT else None
        if short in self._identity_xattrs:
            return self._identity_xattrs[short](generation).encode()
        if short in self._xattrs:
            return self._xattrs[short](await self._disk.residency(generation)).encode()
        return self.gpu.xattr(generation, short, caller().uid)

    async def open(self, inode: Inode, caller: Caller) -> ControlHandle:
        """Open a control file. Raises NotPermittedError when it is a command that the caller may not give."""
        name = inode.control
        if self._commands.knows(name):
            if not self.authorisation.may_command(caller):
                raise NotPermittedError(f"{name} /{inode.path}: uid {caller.uid} may not command this mount")
            return self._commands.start(name, inode, caller.uid)
        directory, _, asked = name.partition("/")
        if directory == GPU_DIRECTORY and asked:
            assert inode.generation is not None
            return await self.gpu.open(inode.generation, asked, caller.uid, caller.pid)
        if name == "info":
            return Text(await self._reports.info(inode, caller))
        if name == "tensors":
            assert inode.generation is not None
            return Text(await self._tables.table(inode.generation))
        if name == "shared":
            return Text(await self._reports.shared(inode, caller))
        return Text(await self._root_files[name](caller))

    def assign_handle(self, file: ControlHandle, handle: int) -> None:
        """An open control file has this handle."""
        if isinstance(file, LeaseFile):
            self.gpu.assign_handle(file, handle)

    def restored(self, inode: Inode, handle: int) -> ControlHandle | None:
        """A control file that an earlier server opened; None when it cannot go on."""
        directory, _, asked = inode.control.partition("/")
        return self.gpu.restored(handle, asked) if directory == GPU_DIRECTORY else None


def shows_content(name: str) -> bool:
    """Whether a control file or attribute of a file lets who reads it have something of its content."""
    return name == "tensors" or name.startswith((f"{GPU_DIRECTORY}/", f"{GPU_DIRECTORY}."))


def _boolean(value: bool) -> str:
    return "true" if value else "false"
