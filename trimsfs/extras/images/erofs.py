"""Writes EROFS images of which large files are devices of their own: ``mount -t erofs -o dax=always,device=...``.

The format is that of Linux' fs/erofs/erofs_fs.h. All inodes are extended, nothing is inline or compressed: so every
byte can be mapped by DAX. A chunk of a file is on its device as far as it is whole; the rest of each file, and small
files, are in the image.
"""

import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from trimsfs.checksums import crc32c

BLOCK = 4096
CHUNK = 2 << 20
"""Bytes of a chunk, and what the sizes of devices are multiples of: a guest maps them by huge pages."""
READERS = 16
"""Threads that read files at once: what the host has not yet comes sooner."""
_MAGIC, _SUPERBLOCK_AT, _IDENTIFIER_AT = 0xE0F5E1E2, 1024, 48
_CHECKSUM, _MTIMES = 0x1, 0x2
"""Compatible features: the superblock has a checksum; inodes have times of change."""
_CHUNKED, _DEVICE_TABLE = 0x4, 0x8
"""Features that a kernel must know."""
_SLOT, _FIRST_SLOT = 128, 9
"""Bytes of a slot of the device table, and its first slot: the next multiple after the superblock."""
_UNIT = 32
"""Bytes that numbers of inodes count in."""
_EXTENDED, _FLAT, _CHUNKS = 1, 0 << 1, 4 << 1
_CHUNK_INDEXES = 0x20
_SUPERBLOCK = struct.Struct("<II I BBH QQIIII 16s16s IHHHBBIQB 23x")
_INODE = struct.Struct("<HHHH QI IIIQII 16x")
_ENTRY = struct.Struct("<QHBx")
_INDEX = struct.Struct("<HHI")


@dataclass(slots=True)
class Attributes:
    """What ``stat`` tells of a name; ``mode`` has its permissions alone."""

    mode: int
    user: int
    group: int
    modified_ns: int


@dataclass(slots=True)
class Directory:
    """A directory: what is in it, by name."""

    attributes: Attributes
    entries: "dict[bytes, Node]" = field(default_factory=dict)


@dataclass(slots=True)
class Link:
    """A symbolic link."""

    attributes: Attributes
    target: bytes


@dataclass(slots=True)
class File:
    """A file of *size* bytes. *read* returns some of them, by their offset and number; several threads call it.

    With a *device*, its number from 1 on, that has the whole chunks.
    """

    attributes: Attributes
    size: int
    read: Callable[[int, int], bytes]
    device: int = 0

    @property
    def device_bytes(self) -> int:
        """Bytes that are on its device."""
        return self.size // CHUNK * CHUNK if self.device else 0


Node = Directory | Link | File
_KINDS: dict[type[Node], tuple[int, int]] = {
    Directory: (stat.S_IFDIR, 2),
    Link: (stat.S_IFLNK, 7),
    File: (stat.S_IFREG, 1),
}
"""By the kind of a node, its bits of the mode and its number in directories."""


@dataclass(slots=True)
class _Inode:
    """An inode: its number, and the first block of what it has in the image."""

    node: Node
    parent: "_Inode | None"
    number: int = 0
    block: int = 0
    size: int = 0
    names: list[list[bytes]] = field(default_factory=list)
    """Of directories: the names in each block."""

    @property
    def record_bytes(self) -> int:
        """Bytes of the inode and its chunk indexes."""
        file = self.node
        chunks = -(-file.size // CHUNK) if isinstance(file, File) and file.device else 0
        return _INODE.size + chunks * _INDEX.size

    @property
    def image_bytes(self) -> int:
        """Bytes of its content that the image has."""
        return self.size - (self.node.device_bytes if isinstance(self.node, File) else 0)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes that the image has *at* an offset, and how they are read."""

    at: int
    size: int
    read: Callable[[], bytes]


def write(root: Directory, devices: Sequence[int], image: BinaryIO, *, identifier: bytes) -> int:
    """Write the image of a tree to an empty file; its bytes without the hole at its end.

    The *identifier*, 16 bytes, is that of the file system: see `identifier_of`. *devices* has the bytes of each device,
    multiples of CHUNK. The file's size is a multiple of CHUNK, too. Raises OSError, and what a file's *read* does.
    """
    inodes = list(_inodes(root))
    start = -(-(_FIRST_SLOT + len(devices)) * _SLOT // BLOCK)
    end = _place_inodes(inodes)
    block = start + -(-end // BLOCK)
    for inode in inodes:
        inode.block = block
        block += -(-inode.image_bytes // BLOCK)
    for inode in inodes:
        _write_at(image, start * BLOCK + inode.number * _UNIT, _record(inode))
    pieces = _pieces(inodes)
    with ThreadPoolExecutor(READERS) as readers:
        while some := list(islice(pieces, 2 * READERS)):
            for piece, content in zip(some, readers.map(lambda piece: piece.read(), some), strict=True):
                assert len(content) == piece.size
                _write_at(image, piece.at, content)
    _write_at(image, _SUPERBLOCK_AT + _SUPERBLOCK.size, bytes(start * BLOCK - _SUPERBLOCK_AT - _SUPERBLOCK.size))
    for number, size in enumerate(devices):
        _write_at(image, (_FIRST_SLOT + number) * _SLOT, struct.pack("<64xII56x", size // BLOCK, 0))
    _write_superblock(image, inodes, block, start, len(devices), identifier)
    image.truncate(-(-block * BLOCK // CHUNK) * CHUNK)
    return block * BLOCK


def identifier_of(image: Path) -> bytes:
    """The identifier that an image was written with. Raises OSError."""
    with image.open("rb") as file:
        return os.pread(file.fileno(), 16, _SUPERBLOCK_AT + _IDENTIFIER_AT)


def _inodes(root: Directory) -> Iterator[_Inode]:
    """Inodes of a tree, the root's first."""
    waiting = [_Inode(root, None)]
    while waiting:
        inode = waiting.pop()
        match inode.node:
            case Directory(entries=entries):
                inode.names = list(_blocks_of(sorted([b".", b"..", *entries])))
                *whole, last = inode.names
                inode.size = len(whole) * BLOCK + sum(_ENTRY.size + len(name) for name in last)
                waiting += [_Inode(node, inode) for node in entries.values()]
            case Link(target=target):
                inode.size = len(target)
            case File(size=size):
                inode.size = size
        yield inode


def _place_inodes(inodes: list[_Inode]) -> int:
    """Number the inodes by where they are; the bytes that they take. None crosses the end of a block."""
    end = 0
    for inode in inodes:
        if end % BLOCK + _INODE.size > BLOCK:
            end += -end % BLOCK
        inode.number = end // _UNIT
        end += inode.record_bytes + -inode.record_bytes % _UNIT
    return end


def _record(inode: _Inode) -> bytes:
    """An inode as it is in the image, with its chunk indexes."""
    node, attributes = inode.node, inode.node.attributes
    chunked = isinstance(node, File) and node.device
    seconds, nanoseconds = divmod(attributes.modified_ns, 10**9)
    links = 2 + sum(isinstance(each, Directory) for each in node.entries.values()) if isinstance(node, Directory) else 1
    record = _INODE.pack(
        _EXTENDED | (_CHUNKS if chunked else _FLAT),
        0,
        _KINDS[type(node)][0] | attributes.mode,
        0,
        inode.size,
        _CHUNK_INDEXES | (CHUNK // BLOCK).bit_length() - 1 if chunked else inode.block,
        inode.number + 1,
        attributes.user,
        attributes.group,
        seconds & (1 << 64) - 1,
        nanoseconds,
        links,
    )
    if isinstance(node, File) and node.device:
        for chunk in range(node.device_bytes // CHUNK):
            record += _INDEX.pack(0, node.device, chunk * CHUNK // BLOCK)
        if inode.image_bytes:
            record += _INDEX.pack(0, 0, inode.block)
    return record


def _blocks_of(names: list[bytes]) -> Iterator[list[bytes]]:
    """The names that fit into each block of a directory."""
    block, taken = list[bytes](), 0
    for name in names:
        if taken + _ENTRY.size + len(name) > BLOCK:
            yield block
            block, taken = [], 0
        block.append(name)
        taken += _ENTRY.size + len(name)
    yield block


def _pieces(inodes: list[_Inode]) -> Iterator[_Piece]:
    """What the image has of the content of inodes."""
    by_node = {id(inode.node): inode for inode in inodes}
    for inode in inodes:
        at = inode.block * BLOCK
        match inode.node:
            case Directory():
                yield _Piece(at, inode.size, partial(_entries, inode, by_node))
            case Link(target=target):
                yield _Piece(at, inode.size, partial(bytes, target))
            case File(size=size, device_bytes=begin, read=read):
                for offset in range(begin, size, CHUNK):
                    length = min(CHUNK, size - offset)
                    yield _Piece(at + offset - begin, length, partial(read, offset, length))


def _entries(inode: _Inode, by_node: dict[int, _Inode]) -> bytes:
    """The content of a directory."""
    assert isinstance(inode.node, Directory)
    content = b""
    for names in inode.names:
        content += bytes(-len(content) % BLOCK)
        at, heads = len(names) * _ENTRY.size, b""
        for name in names:
            to = {b".": inode, b"..": inode.parent or inode}.get(name) or by_node[id(inode.node.entries[name])]
            heads += _ENTRY.pack(to.number, at, _KINDS[type(to.node)][1])
            at += len(name)
        content += heads + b"".join(names)
    return content


def _write_superblock(
    image: BinaryIO, inodes: list[_Inode], blocks: int, start: int, devices: int, identifier: bytes
) -> None:
    features = _CHUNKED | _DEVICE_TABLE if devices else 0

    def packed(checksum: int) -> bytes:
        return _SUPERBLOCK.pack(
            *(_MAGIC, checksum, _CHECKSUM | _MTIMES, BLOCK.bit_length() - 1, 0, inodes[0].number, len(inodes)),
            *(0, 0, blocks, start, 0, identifier, b"", features, 0, devices),
            *(_FIRST_SLOT if devices else 0, 0, 0, 0, 0, 0),
        )

    _write_at(image, _SUPERBLOCK_AT, packed(0))
    image.flush()
    first_block = os.pread(image.fileno(), BLOCK - _SUPERBLOCK_AT, _SUPERBLOCK_AT)
    # The kernel's CRC begins with all ones, and is not inverted at the end.
    _write_at(image, _SUPERBLOCK_AT, packed(crc32c(first_block) ^ 0xFFFFFFFF))
    image.flush()


def _write_at(image: BinaryIO, offset: int, data: bytes) -> None:
    image.seek(offset)
    image.write(data)
