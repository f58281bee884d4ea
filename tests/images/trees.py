"""Trees for images, random ones too, and what Linux finds in an image: mounted here, its devices being files."""

import os
import random
import stat
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.mounts import umount
from trimsfs.extras.images import erofs
from trimsfs.extras.images.erofs import BLOCK, CHUNK, Attributes, Directory, File, Link, Node

TIMEOUT_S = 60
Found = dict[bytes, tuple[object, ...]]
"""What is at each path."""


@contextmanager
def mounted_image(image: Path, devices: Sequence[Path], at: Path) -> Iterator[Path]:
    """Linux mounts an image; skips the test where it cannot."""
    if "erofs" not in Path("/proc/filesystems").read_text():
        subprocess.run(["modprobe", "erofs"], check=False, capture_output=True, timeout=TIMEOUT_S)
    if "erofs" not in Path("/proc/filesystems").read_text():
        pytest.skip("the kernel has no EROFS")
    at.mkdir(exist_ok=True)
    options = ",".join(["ro", *(f"device={device}" for device in devices)])
    command = ["mount", "-t", "erofs", "-o", options, str(image), str(at)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    try:
        yield at
    finally:
        umount(at)


def found(top: Path) -> Found:
    """All that is below a directory, the directory too: type, mode, owner, times, size, and content or target."""
    paths = [top, *top.rglob("*")]
    facts: Found = {}
    for path in paths:
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        size = None if stat.S_ISDIR(status.st_mode) else status.st_size
        key = os.fsencode(path.relative_to(top))
        facts[key] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, size, content)
    return facts


class RandomTree:
    """A tree of random shape: its node, its devices below a directory, and what Linux must find."""

    def __init__(self, draw: random.Random, directory: Path) -> None:
        self._draw = draw
        self._directory = directory
        self.devices: list[Path] = []
        self.expected: Found = {}
        self.root = self._tree(b".", draw.choice([0, 1, 2, 3]))

    def write(self, image: Path) -> None:
        with image.open("w+b") as file:
            sizes = [device.stat().st_size // CHUNK * CHUNK for device in self.devices]
            erofs.write(self.root, sizes, file, identifier=uuid.uuid4().bytes)

    def _tree(self, path: bytes, depth: int) -> Directory:
        directory = Directory(self._attributes())
        self._expect(path, stat.S_IFDIR, directory.attributes, None, None)
        for _ in range(self._draw.choice([0, 1, 3, 10, 100 if depth < 2 else 5])):
            name = self._name()
            if name in directory.entries or name in {b".", b".."}:
                continue
            below = name if path == b"." else path + b"/" + name
            directory.entries[name] = self._node(below, depth)
        return directory

    def _node(self, path: bytes, depth: int) -> Node:
        kind = self._draw.choice(["file", "file", "file", "link", "tree" if depth else "file"])
        if kind == "tree":
            return self._tree(path, depth - 1)
        attributes = self._attributes()
        if kind == "link":
            target = self._draw.randbytes(self._draw.choice([1, 20, 4095])).replace(b"\0", b"x")
            self._expect(path, stat.S_IFLNK, Attributes(0o777, 0, 0, 0), len(target), os.fsdecode(target), attributes)
            return Link(Attributes(0o777, attributes.user, attributes.group, attributes.modified_ns), target)
        return self._file(path, attributes)

    def _file(self, path: bytes, attributes: Attributes) -> File:
        near = self._draw.choice([0, 0, 1, BLOCK, 3 * BLOCK])
        size = max(0, near + self._draw.randint(-2, 2))
        if len(self.devices) < 5 and self._draw.random() < 0.05:
            size = max(0, self._draw.choice([1, 2]) * CHUNK + self._draw.choice([0, 1, BLOCK, -1]))
        content = self._draw.randbytes(size)
        device = 0
        if size >= CHUNK:
            self.devices.append(self._directory / f"device-{len(self.devices)}")
            self.devices[-1].write_bytes(content)
            device = len(self.devices)
        self._expect(path, stat.S_IFREG, attributes, size, content)
        return File(attributes, size, partial(_part, content), device)

    def _name(self) -> bytes:
        length = self._draw.choice([1, 2, 8, 8, 8, 255])
        return self._draw.randbytes(length).replace(b"\0", b"0").replace(b"/", b"1")

    def _attributes(self) -> Attributes:
        draw = self._draw
        modified = draw.choice([0, 1, draw.randrange(1 << 61)])
        return Attributes(draw.randrange(0o1000), draw.choice([0, 65534, 70000]), draw.choice([0, 1, 70000]), modified)

    def _expect(
        self,
        path: bytes,
        kind: int,
        attributes: Attributes,
        size: int | None,
        content: object,
        owner: Attributes | None = None,
    ) -> None:
        owner = owner or attributes
        self.expected[path] = (kind | attributes.mode, owner.user, owner.group, owner.modified_ns, size, content)


def _part(content: bytes, offset: int, length: int) -> bytes:
    return content[offset : offset + length]
