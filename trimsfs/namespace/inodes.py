"""Inodes: the numbers that the kernel knows files and directories by, and how many references it has to each."""

import enum
import hashlib
import json
import os
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

from trimsfs.errors import NoSuchEntryError
from trimsfs.handover.ledger import Ledger, Record, RecordKind
from trimsfs.types import Generation

ROOT_INODE = 1
_INODE_BITS = 62
PASSTHROUGH_BIT = 1 << _INODE_BITS
"""Set in the number by which a name leads to its object while its opens are passed through; programs never see it."""


class InodeKind(enum.Enum):
    """What an inode is."""

    DIRECTORY = "directory"
    OBJECT = "object"
    CONTROL_DIRECTORY = "control directory"
    CONTROL_FILE = "control file"


IN_THE_STORE = {InodeKind.DIRECTORY, InodeKind.OBJECT}


@dataclass(slots=True, eq=False)
class Inode:
    """A file or directory that the kernel may know.

    ``path`` is the object's key, or the directory's prefix with its closing slash (the root's is empty).
    Control inodes have the path of what they are about, and for a file the ``control`` name. ``lookups`` counts
    the kernel's references. ``replaced``: the store has shown another generation. An object has two inodes, told
    apart by PASSTHROUGH_BIT in the number: the kernel passes opens of the ``passthrough`` one to the local file, and
    the server answers reads of the other. ``slot`` is where the ledger has it, once the kernel has got it.
    """

    number: int
    kind: InodeKind
    path: str
    generation: Generation | None = None
    control: str = ""
    lookups: int = 0
    replaced: bool = False
    slot: int | None = None

    @property
    def passthrough(self) -> bool:
        return bool(self.number & PASSTHROUGH_BIT)


class Inodes:
    """The inodes that the kernel may know, those of earlier servers included.

    A number is a function of what the inode is, so every server finds the same.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._root = Inode(ROOT_INODE, InodeKind.DIRECTORY, "", lookups=1)
        self._by_number = {ROOT_INODE: self._root}
        self._named: dict[str, set[int]] = {}
        """Files and directories of the store by the directory that they are in."""
        self._links: dict[tuple[str, str], set[int]] = {}
        """Links by the file and the content that they lead to."""
        for record in ledger.inherited(RecordKind.INODE):
            self._add(_unpacked(record))

    def _add(self, inode: Inode) -> Inode:
        self._by_number[inode.number] = inode
        for index, key in self._indexed(inode):
            index.setdefault(key, set()).add(inode.number)
        return inode

    def _remove(self, inode: Inode) -> None:
        if self._by_number.pop(inode.number, None) is not None:
            for index, key in self._indexed(inode):
                index[key].remove(inode.number)
                if not index[key]:
                    del index[key]

    def _indexed(self, inode: Inode) -> Iterator[tuple[dict[Any, set[int]], str | tuple[str, str]]]:
        """The indexes that an inode is in, and under what."""
        if inode.kind in IN_THE_STORE and not inode.control:
            yield self._named, directory_of(inode.path)
        generation = inode.generation
        if inode.kind is InodeKind.OBJECT and generation is not None and generation.linked is not None:
            yield self._links, (generation.file, generation.etag)

    def __len__(self) -> int:
        return len(self._by_number)

    def __iter__(self) -> Iterator[Inode]:
        return iter(self._by_number.values())

    def get(self, number: int) -> Inode | None:
        """An inode by its number, if it is known."""
        return self._by_number.get(number)

    def __getitem__(self, number: int) -> Inode:
        """An inode that the kernel knows. Raises NoSuchEntryError for one it should not."""
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
        passthrough: bool = False,
    ) -> Inode:
        """The inode of a thing, made when it is not known yet.

        The caller counts with `count_lookup` what the kernel gets, and discards an inode that it does not get.
        """
        if kind is InodeKind.DIRECTORY and not path:
            return self._root
        etag = generation.etag if generation is not None else ""
        for salt in range(len(self._by_number) + 1):
            number = _number(kind, path, etag, control, salt) | (PASSTHROUGH_BIT if passthrough else 0)
            inode = self._by_number.get(number)
            if inode is None:
                return self._add(Inode(number, kind, path, generation, control))
            known = inode.generation.etag if inode.generation is not None else ""
            if (inode.kind, inode.path, known, inode.control) == (kind, path, etag, control):
                return inode
        raise AssertionError("unreachable: more salts than inodes were tried")

    def known_names(self, prefix: str, kinds: Set[InodeKind] = IN_THE_STORE) -> list[tuple[int, bytes]]:
        """The names by which the kernel may know what is in a directory, each after the directory's inode number."""
        directory = self.reference(InodeKind.DIRECTORY, prefix)
        self.discard(directory)
        inodes = (self._by_number[number] for number in self._named.get(prefix, ()))
        paths = {inode.path for inode in inodes if inode.lookups and inode.kind in kinds}
        return [(directory.number, os.fsencode(path[len(prefix) :].removesuffix("/"))) for path in paths]

    def known_names_below(self, path: str) -> list[tuple[int, bytes]]:
        """Those of a file or directory (with its closing slash), and of all that is below it."""
        name = os.fsencode(path[len(directory_of(path)) :].removesuffix("/"))
        found = [known for known in self.known_names(directory_of(path)) if known[1] == name] if path else []
        for prefix in list(self._named):
            if is_below(prefix, path):
                found += self.known_names(prefix)
        return found

    def cached_numbers(self, generation: Generation) -> list[int]:
        """The numbers by which the kernel may know an object, and the links to it, that is served in cached mode."""
        file = replace(generation, key=generation.file, linked=None)
        itself = self.reference(InodeKind.OBJECT, file.key, file)
        self.discard(itself)
        links = (self._by_number[number] for number in sorted(self._links.get((file.key, file.etag), ())))
        return [inode.number for inode in (itself, *links) if inode.lookups and not inode.passthrough]

    def count_lookup(self, inode: Inode) -> None:
        """The kernel is about to get an inode once more."""
        inode.lookups += 1
        if inode.slot is not None:
            self._ledger.set_count(inode.slot, inode.lookups)
        elif inode is not self._root:
            inode.slot = self._ledger.add(RecordKind.INODE, inode.number, _packed(inode), count=inode.lookups)

    def forget(self, number: int, lookups: int) -> None:
        """The kernel gave up that many references to an inode."""
        inode = self._by_number.get(number)
        if inode is None or inode is self._root:
            return
        inode.lookups = max(inode.lookups - lookups, 0)
        if inode.slot is not None:
            self._ledger.set_count(inode.slot, inode.lookups)
        if inode.lookups == 0:
            self._remove(inode)

    def discard(self, inode: Inode) -> None:
        """Drop an inode that the kernel did not get after all."""
        if inode.lookups <= 0 and inode is not self._root:
            self._remove(inode)


def directory_of(path: str) -> str:
    """The directory that a file or directory (with its closing slash) is in."""
    return path[: path.rfind("/", 0, -1) + 1]


def is_below(path: str, above: str) -> bool:
    """Whether a path is another, or lies below it if that is a directory, with its closing slash; the root's is
    empty."""
    return path == above or (path.startswith(above) and above[-1:] in {"", "/"})


def _packed(inode: Inode) -> bytes:
    """An inode for the ledger."""
    generation = inode.generation
    content: tuple[object, ...] | None = None
    if generation is not None:
        content = (generation.key, generation.etag, generation.size, generation.modified_ns, generation.version_id)
        if generation.linked is not None:
            content = (*content, generation.linked)
    return json.dumps((inode.kind.value, inode.path, inode.control, content)).encode()


def _unpacked(record: Record) -> Inode:
    kind, path, control, content = json.loads(record.content)
    generation = None
    if content is not None:
        key, etag, size, modified_ns, version_id, *linked = content
        generation = Generation(
            key=key,
            etag=etag,
            size=size,
            modified_ns=modified_ns,
            version_id=version_id,
            linked=linked[0] if linked else None,
        )
    return Inode(record.number, InodeKind(kind), path, generation, control, lookups=record.count, slot=record.slot)


def _number(kind: InodeKind, path: str, etag: str, control: str, salt: int) -> int:
    identity = "\0".join((kind.value, path, etag, control, str(salt)))
    digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=8).digest()
    number = int.from_bytes(digest) & ((1 << _INODE_BITS) - 1)
    return number if number > ROOT_INODE else number + 2
