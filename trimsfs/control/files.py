"""The control surface: extended attributes and control files, by name.

Reading an attribute or an ``info`` file only looks. A command file acts: opening it starts the command, each
read gives the next line of JSON on how far it has come, closing it ends the command. So a command dies with the
process that gave it, and needs nothing but the path.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from trimsfs.control.commands import Commands, as_json
from trimsfs.control.handle import ControlHandle
from trimsfs.errors import NotPermittedError
from trimsfs.gpu.interface import DIRECTORY as GPU_DIRECTORY
from trimsfs.gpu.interface import GpuInterface, LeaseFile
from trimsfs.models.derived_blobs import owner
from trimsfs.models.tensor_tables import TensorTables
from trimsfs.namespace.directory import CONTROL_NAME
from trimsfs.namespace.inodes import Inode, InodeKind
from trimsfs.namespace.permissions import Permissions
from trimsfs.opening.passthrough import Passthrough
from trimsfs.options import MountOptions
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.deduplication import Deduplication
from trimsfs.tiers.disk.residency import Residency
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Generation

log = logging.getLogger(__name__)

XATTR_PREFIX = "user.trims."
XATTR_LIMIT = 65536
"""Bytes of the longest value that the kernel passes on."""
CONTROL_PART = f"{CONTROL_NAME.decode()}/"
SUBJECT = "subject"
"""Marks the inode of ``.trims/NAME``, as against ``.trims`` itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who opened a control file: ids as the host sees them, the thread's 0 when it is in another PID namespace."""

    uid: int
    groups: frozenset[int]
    pid: int = 0


class _Text:
    """A control file whose content is made when it is opened."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]

    def close(self) -> None:
        """Nothing goes on."""


class Control:
    """Answers for everything under ``.trims`` and ``user.trims.*``."""

    def __init__(
        self,
        disk: DiskTier,
        passthrough: Passthrough,
        tables: TensorTables,
        sharing: Deduplication,
        commands: Commands,
        gpu: GpuInterface,
        options: MountOptions,
        *,
        metrics: Callable[[], bytes],
        facts: Callable[[], dict[str, object]],
    ) -> None:
        self._disk = disk
        self._passthrough = passthrough
        self._tables = tables
        self._sharing = sharing
        self._commands = commands
        self.gpu = gpu
        self.permissions = Permissions(options)
        self._options = options
        self._metrics = metrics
        self._facts = facts
        self._root_files: dict[str, Callable[[Caller], Awaitable[bytes]]] = {
            "control": self._control,
            "gpu": self._gpu_copies,
            "metrics": self._render_metrics,
            "models": partial(self._models, ""),
        }
        # At once, without a look at what is here.
        self._identity_xattrs: dict[str, Callable[[Generation], str]] = {
            "etag": lambda generation: generation.etag,
            "generation": lambda generation: generation.token(disk.store),
        }
        self._xattrs: dict[str, Callable[[Residency], str]] = {
            "digest": lambda here: here.digest or "",
            "pinned": lambda here: _boolean(here.pinned),
            "residency": lambda here: json.dumps(self._residency(here)),
            "verified": lambda here: _boolean(here.verified),
        }

    @property
    def tells_common(self) -> bool:
        """Whether there are files that tell what a model has in common with another."""
        return self._options.share_chunks

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
            self._authorise(caller, name, inode.path)
            return self._commands.start(name, inode, caller.uid)
        directory, _, asked = name.partition("/")
        if directory == GPU_DIRECTORY and asked:
            assert inode.generation is not None
            return await self.gpu.open(inode.generation, asked, caller.uid, caller.pid)
        if name == "info":
            return _Text(await self._info(inode, caller))
        if name == "tensors":
            assert inode.generation is not None
            return _Text(await self._tables.table(inode.generation))
        if name == "shared":
            assert inode.generation is not None
            return _Text(
                as_json(await self._sharing.shared_with(inode.generation, partial(self._may_tell, caller, inode.path)))
            )
        return _Text(await self._root_files[name](caller))

    def assign_handle(self, file: ControlHandle, handle: int) -> None:
        """An open control file has this handle."""
        if isinstance(file, LeaseFile):
            self.gpu.assign_handle(file, handle)

    def restored(self, inode: Inode, handle: int) -> ControlHandle | None:
        """A control file that an earlier server opened; None when it cannot go on."""
        directory, _, asked = inode.control.partition("/")
        return self.gpu.restored(handle, asked) if directory == GPU_DIRECTORY else None

    def _authorise(self, caller: Caller, command: str, path: str) -> None:
        if not self._commands_allowed(caller):
            raise NotPermittedError(f"{command} /{path}: uid {caller.uid} may not command this mount")

    def _commands_allowed(self, caller: Caller) -> bool:
        return caller.uid in {0, self._options.uid} or self._options.control_gid in caller.groups

    # Looking

    async def _info(self, inode: Inode, caller: Caller) -> bytes:
        if inode.generation is not None:
            return as_json(self._model(await self._disk.residency(inode.generation)))
        return await self._models(inode.path, caller)

    async def _models(self, prefix: str, caller: Caller) -> bytes:
        """What is here of the objects below a prefix that the caller may read; of the others nothing is told."""
        on_disk = await self._disk.residencies()
        on_gpu = self.gpu.generations()
        absent = on_gpu.keys() - {here.token for here in on_disk}
        # First: of a path that is here in several contents, the last is the newest.
        only_lent = [await self._disk.residency(on_gpu[token]) for token in absent]
        below = [
            here
            for here in (*only_lent, *on_disk)
            if here.generation.key.startswith(prefix) and self._may_read(here.generation.key, caller)
        ]
        return as_json({"path": prefix, "models": [self._model(here) for here in below]})

    def _may_read(self, key: str, caller: Caller) -> bool:
        made_by = owner(key.rpartition("/")[2]) if CONTROL_PART in key else None
        if made_by is not None and caller.uid not in {0, made_by}:
            return False
        return self.permissions.may_read(key, caller.uid, caller.groups)

    def _may_tell(self, caller: Caller, asked: str, blob: Blob) -> bool:
        """Whether a caller may learn of a blob that is ready to be mapped; a container's root may read all, but of a
        tenant's model only who uses another of that tenant is told."""
        key = blob.generation.key
        known = self.permissions.tenant(key) in {None, self.permissions.tenant(asked)}
        return known and self._passthrough.ready(blob) and self._may_read(key, caller)

    async def _render_metrics(self, caller: Caller) -> bytes:
        text = self._metrics()
        if not self._commands_allowed(caller):
            text = b"".join(line for line in text.splitlines(keepends=True) if b'{tenant="' not in line)
        return text

    async def _control(self, caller: Caller) -> bytes:
        facts = self._facts()
        if not self._commands_allowed(caller):
            facts = {name: fact for name, fact in facts.items() if name != "options"}  # it names tenants
        return as_json(facts)

    async def _gpu_copies(self, caller: Caller) -> bytes:
        """The copies of files that the caller may read, and who uses them, as far as that is the caller's affair."""
        uid = None if self._commands_allowed(caller) else caller.uid
        devices = self.gpu.copies(lambda generation: self._may_read(generation.key, caller), uid)
        return as_json({"devices": devices})

    def _model(self, here: Residency) -> dict[str, object]:
        generation = here.generation
        return {
            "path": generation.key.encode(errors="surrogateescape").decode(errors="replace"),
            "size": generation.size,
            "generation": here.token,
            "etag": generation.etag,
            "version_id": generation.version_id,
            "modified": generation.modified_ns / 1e9,
            "residency": self._residency(here),
            "verified": here.verified,
            "digest": here.digest or None,
            "passthrough": self._passthrough.has(generation),
            "pinned": here.pinned,
            "open": here.users,
            "uses": here.uses,
            "last_used": here.last_used or None,
        }

    def _residency(self, here: Residency) -> dict[str, object]:
        return {"disk": here.disk_bytes, "host": here.host_bytes, "gpu": self.gpu.resident(here.generation)}


def shows_content(name: str) -> bool:
    """Whether a control file or attribute of a file lets who reads it have something of its content."""
    return name == "tensors" or name.startswith((f"{GPU_DIRECTORY}/", f"{GPU_DIRECTORY}."))


def _boolean(value: bool) -> str:
    return "true" if value else "false"
