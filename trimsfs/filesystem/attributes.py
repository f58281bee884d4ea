"""The attributes that the kernel gets of files and directories."""

import os
import stat
from dataclasses import dataclass

from trimsfs.errors import NoSuchEntryError
from trimsfs.namespace.derived import owner
from trimsfs.namespace.inodes import Inode, InodeKind, Inodes
from trimsfs.namespace.listing import Entry, NonObject
from trimsfs.namespace.permissions import Ownership, Permissions
from trimsfs.types import Generation, Symlink

FOREVER_S = 86400.0
"""How long the kernel caches attributes: an inode's never change, as another content is another inode."""
CONTROL_TTL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """The attributes of an inode. The kernel may cache the name that led to it for ``entry_ttl_s`` seconds."""

    inode: Inode
    directory: bool
    ownership: Ownership
    size: int
    modified_ns: int
    entry_ttl_s: float

    @property
    def mode(self) -> int:
        """The type and the permission bits, as in ``st_mode``."""
        if self.inode.kind is InodeKind.SYMLINK:
            return stat.S_IFLNK | 0o777
        return (stat.S_IFDIR if self.directory else stat.S_IFREG) | self.ownership.mode


class Describer:
    """Makes the attributes of inodes and entries. *mounted_ns* is the time of those without one of their own."""

    def __init__(self, inodes: Inodes, permissions: Permissions, *, mounted_ns: int) -> None:
        self._inodes = inodes
        self._permissions = permissions
        self._mounted_ns = mounted_ns

    def inode(self, inode: Inode, ttl_s: float) -> Attributes:
        """The attributes of an inode."""
        generation = inode.generation if inode.kind is InodeKind.OBJECT else None
        directory = inode.kind in {InodeKind.DIRECTORY, InodeKind.CONTROL_DIRECTORY}
        return Attributes(
            inode=inode,
            directory=directory,
            ownership=self._ownership(inode, directory),
            size=generation.size if generation is not None else len(os.fsencode(inode.target)),
            modified_ns=generation.modified_ns if generation is not None else self._mounted_ns,
            entry_ttl_s=ttl_s,
        )

    def entry(self, prefix: str, name: bytes, entry: Entry, ttl_s: float) -> Attributes:
        """The attributes of a name in the directory *prefix*. Raises NoSuchEntryError if there is no such name."""
        if isinstance(entry, Generation):
            return self.inode(self._inodes.reference(InodeKind.OBJECT, entry.key, entry), ttl_s)
        path = prefix + os.fsdecode(name)
        if isinstance(entry, Symlink):
            return self.inode(self._inodes.reference(InodeKind.SYMLINK, path, target=entry.target), ttl_s)
        if entry is NonObject.DIRECTORY:
            inode = self._inodes.reference(InodeKind.DIRECTORY, f"{path}/")
        elif entry is NonObject.UNREADABLE:  # listed only: its lookup fails
            inode = self._inodes.reference(InodeKind.OBJECT, path)
        else:
            raise NoSuchEntryError(path)
        return self.inode(inode, ttl_s)

    def _ownership(self, inode: Inode, directory: bool) -> Ownership:
        """The ownership of an inode: a control file has its subject's, and a derived blob belongs to one user."""
        ownership = self._permissions.of(inode.path, directory=directory)
        user = owner(inode.control) if inode.kind is InodeKind.OBJECT else None
        return ownership if user is None else Ownership(user, ownership.gid, 0o400)
