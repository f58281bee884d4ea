"""Inodes: the numbers by which the kernel knows files and directories, and its references to each."""

import enum
import hashlib
import json
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from itertools import islice

from trimsfs.errors import NoSuchEntryError
from trimsfs.handover.ledger import Ledger, Record, RecordKind
from trimsfs.origins import Origins
from trimsfs.types import Generation

ROOT_INODE = 1
_INODE_BITS = 62


class InodeKind(enum.Enum):
    """The kinds of inodes."""

    DIRECTORY = "directory"
    OBJECT = "object"
    SYMLINK = "symlink"
    CONTROL_DIRECTORY = "control directory"
    CONTROL_FILE = "control file"


IN_THE_STORE = {InodeKind.DIRECTORY, InodeKind.OBJECT, InodeKind.SYMLINK}


@dataclass(slots=True, eq=False)
class Inode:
    """A file, directory or symbolic link that the kernel may know.

    ``path`` is the object's key, or the directory's prefix with its closing slash (the root's is empty). A link with
    another ``target`` is another inode. A control inode has the path of its subject, and a control file its name in
    ``control``. ``lookups`` counts the kernel's references. ``replaced`` is set when the store has another generation.
    ``slot`` is its record in the ledger, made before the kernel gets it. ``opened`` is set once a program has opened
    it: the kernel may then have pages of it. Programs have it open by ``cached`` handles, whose reads the server
    answers, or by ``passed`` ones. The kernel passes the reads of these through to the local file. It refuses opens of
    one inode in both modes, or of two local files. While such a file is ``lost``, names lead to another inode.
    """

    number: int
    kind: InodeKind
    path: str
    generation: Generation | None = None
    control: str = ""
    lookups: int = 0
    replaced: bool = False
    slot: int | None = None
    target: str = ""
    opened: bool = False
    cached: int = 0
    passed: int = 0
    lost: bool = False


class Inodes:
    """The inodes that the kernel may know, including those of earlier servers.

    A number is a hash of what the inode is, so every server computes the same. *origins* are those of a mount with
    several stores, which may be at other paths than those of an earlier server.
    """

    def __init__(self, ledger: Ledger, origins: Origins | None = None) -> None:
        self._ledger = ledger
        self._root = Inode(ROOT_INODE, InodeKind.DIRECTORY, "", lookups=1)
        self._by_number = {ROOT_INODE: self._root}
        self._named: dict[str, set[int]] = {}
        """Numbers of the store's files and directories, by the directory that holds them."""
        for record in ledger.inherited(RecordKind.INODE):
            inode = _unpacked(record)
            if inode.generation is not None and origins is not None:
                linked = origins.relinked(inode.generation.key, inode.generation.linked)
                inode.generation = replace(inode.generation, linked=linked)
            self._add(inode)

    def _add(self, inode: Inode) -> Inode:
        self._by_number[inode.number] = inode
        if _is_named(inode):
            self._named.setdefault(directory_of(inode.path), set()).add(inode.number)
        return inode

    def _remove(self, inode: Inode) -> None:
        if self._by_number.pop(inode.number, None) is not None and _is_named(inode):
            directory = directory_of(inode.path)
            self._named[directory].remove(inode.number)
            if not self._named[directory]:
                del self._named[directory]

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._by_number.values())

    def get(self, number: int) -> Inode | None:
        """The inode of a number; None if it is not known."""
        return self._by_number.get(number)

    def __getitem__(self, number: int) -> Inode:
        """The inode of a number that the kernel uses. Raises NoSuchEntryError if it is not known."""
        try:
            return self._by_number[number]
        except KeyError:
            raise NoSuchEntryError(f"inode {number} is not known") from None

    def reference(
        self,
        kind: InodeKind,
        path: str,
        generation: Generation | None = None,
        control: str = "",
        *,
        target: str = "",
    ) -> Inode:
        """Return the inode of a thing, made if new.

        The caller calls `count_lookup` if the kernel gets the inode, `discard` if not.
        """
        if kind is InodeKind.DIRECTORY and not path:
            return self._root
        etag = generation.etag if generation is not None else target
        for salt in range(len(self._by_number) + 1):
            number = _number(kind, path, etag, control, salt)
            inode = self._by_number.get(number)
            if inode is None:
                return self._add(Inode(number, kind, path, generation, control, target=target))
            known = inode.generation.etag if inode.generation is not None else inode.target
            if (inode.kind, inode.path, known, inode.control) == (kind, path, etag, control) and not inode.lost:
                return inode
        raise AssertionError("unreachable: more salts than inodes were tried")

    def known_names(self, prefix: str, kinds: Set[InodeKind] = IN_THE_STORE) -> list[tuple[int, bytes]]:
        """The names in a directory that the kernel may know, each after the directory's inode number."""
        directory = self.reference(InodeKind.DIRECTORY, prefix)
        self.discard(directory)
        inodes = (self._by_number[number] for number in self._named.get(prefix, ()))
        paths = {inode.path for inode in inodes if inode.lookups and inode.kind in kinds}
        return [(directory.number, os.fsencode(path[len(prefix) :].removesuffix("/"))) for path in paths]

    def known_names_below(self, path: str) -> list[tuple[int, bytes]]:
        """As `known_names`, of a file or directory (with its closing slash) and of everything below it."""
        name = os.fsencode(path[len(directory_of(path)) :].removesuffix("/"))
        names = [known for known in self.known_names(directory_of(path)) if known[1] == name] if path else []
        for prefix in list(self._named):
            if is_below(prefix, path):
                names += self.known_names(prefix)
        return names

    def numbers(self, generation: Generation) -> list[int]:
        """The numbers by which the kernel may know a content: those of an object, of links to it, and of one that was
        lost. Includes those that earlier versions of trimsfs gave. Looks at all inodes."""
        wanted = (generation.file, generation.etag)
        return [
            inode.number
            for inode in self._by_number.values()
            if inode.lookups
            and inode.kind is InodeKind.OBJECT
            and inode.generation is not None
            and (inode.generation.file, inode.generation.etag) == wanted
        ]

    def count_lookup(self, inode: Inode) -> None:
        """Record that the kernel is about to get an inode once more."""
        inode.lookups += 1
        if inode.slot is not None:
            self._ledger.set_count(inode.slot, inode.lookups)
        elif inode is not self._root:
            inode.slot = self._ledger.add(RecordKind.INODE, inode.number, _packed(inode), count=inode.lookups)

    def forget(self, number: int, lookups: int) -> None:
        """Record that the kernel gave up *lookups* references to an inode."""
        inode = self._by_number.get(number)
        if inode is None or inode is self._root:
            return
        inode.lookups = max(inode.lookups - lookups, 0)
        if inode.slot is not None:
            self._ledger.set_count(inode.slot, inode.lookups)
        if inode.lookups == 0:
            self._remove(inode)

    def never_opened(self, count: int) -> list[int]:
        """Of the next *count* inodes, known longest first, the numbers of files that no program has opened.

        A later call goes on with the inodes after them.
        """
        numbers = list(islice(self._by_number, count))
        for number in numbers:
            self._by_number[number] = self._by_number.pop(number)
        inodes = (self._by_number[number] for number in numbers)
        return [inode.number for inode in inodes if inode.kind is InodeKind.OBJECT and not inode.opened]

    def discard(self, inode: Inode) -> None:
        """Drop an inode to which the kernel has no reference."""
        if inode.lookups <= 0 and inode is not self._root:
            self._remove(inode)


def _is_named(inode: Inode) -> bool:
    """Whether an inode is one of the store's names, not a control file or what is derived from a model."""
    return inode.kind in IN_THE_STORE and not inode.control


def directory_of(path: str) -> str:
    """The directory that holds a file or directory (with its closing slash)."""
    return path[: path.rfind("/", 0, -1) + 1]


def is_below(path: str, above: str) -> bool:
    """Whether *path* equals *above* or lies below it. A directory ends with a slash; the root is empty."""
    return path == above or (path.startswith(above) and above[-1:] in {"", "/"})


def _packed(inode: Inode) -> bytes:
    """The content of an inode's ledger record."""
    generation = inode.generation
    content: tuple[object, ...] | str | None = inode.target or None
    if generation is not None:
        content = (generation.key, generation.etag, generation.size, generation.modified_ns, generation.version_id)
        if generation.linked is not None:
            content = (*content, generation.linked)
    return json.dumps((inode.kind.value, inode.path, inode.control, content)).encode()


def _unpacked(record: Record) -> Inode:
    kind, path, control, content = json.loads(record.content)
    generation, target = None, content if isinstance(content, str) else ""
    if content is not None and not target:
        key, etag, size, modified_ns, version_id, *linked = content
        generation = Generation(
            key=key,
            etag=etag,
            size=size,
            modified_ns=modified_ns,
            version_id=version_id,
            linked=linked[0] if linked else None,
        )
    return Inode(
        record.number, InodeKind(kind), path, generation, control, record.count, slot=record.slot, target=target
    )


def _number(kind: InodeKind, path: str, etag: str, control: str, salt: int) -> int:
    identity = "\0".join((kind.value, path, etag, control, str(salt)))
    digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=8).digest()
    number = int.from_bytes(digest) & ((1 << _INODE_BITS) - 1)
    return number if number > ROOT_INODE else number + 2
