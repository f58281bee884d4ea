"""Reads what an image is to have from a mount: its directories, links and files, and which files become devices."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from trimsfs.cli.control_client import CONTROL_NAME, mount_of_path, translated
from trimsfs.errors import ConfigurationError, NoSuchEntryError, ObjectChangedError
from trimsfs.extras.images.erofs import CHUNK, Attributes, Directory, File, Link, Node

GENERATION = "user.trims.generation"
_MOST_LINKS = 40
"""Links that one path follows at most, as in the kernel."""


@dataclass(frozen=True, slots=True)
class Device:
    """A file of the mount that guests get as a device: *size* bytes of it, a multiple of CHUNK."""

    path: Path
    size: int
    generation: str


@dataclass(slots=True)
class Tree:
    """What an image has: its *root* is that of the mount, with what was named below it."""

    mountpoint: Path
    root: Directory
    devices: list[Device] = field(default_factory=list)
    files: int = 0
    file_bytes: int = 0


def read(paths: Sequence[Path], *, most_devices: int) -> Tree:
    """Read what is at *paths* of one mount, of which the largest files become devices, at most *most_devices*.

    A path may have links, as aliases are: the image has both the link and what it leads to. Raises NotMountedError,
    NoSuchEntryError, and ConfigurationError for paths of several mounts or links that lead out of the image.
    """
    mountpoints = {mount_of_path(path).mountpoint for path in paths}
    if len(mountpoints) > 1:
        raise ConfigurationError(f"{' and '.join(map(str, sorted(mountpoints)))}: an image has files of one mount")
    reader = _Reader(mountpoints.pop())
    for path in paths:
        try:
            reader.add(path)
        except OSError as error:
            raise translated(error, path) from error
    reader.choose(most_devices)
    return reader.tree


class _Reader:
    def __init__(self, mountpoint: Path) -> None:
        self._large: dict[int, list[tuple[Path, File]]] = {}
        self._links: list[Path] = []
        root = self._node(mountpoint, os.stat(mountpoint))
        assert isinstance(root, Directory)
        self.tree = Tree(mountpoint, root)

    def add(self, path: Path) -> None:
        """Add what is at a path, and the directories and links that lead there."""
        whole = Path(os.path.abspath(path))
        if not whole.is_relative_to(self.tree.mountpoint):
            whole = Path(os.path.realpath(path))
        parts = list(whole.relative_to(self.tree.mountpoint).parts)
        at, directory, followed = self.tree.mountpoint, self.tree.root, 0
        while parts:
            name = parts.pop(0)
            match self._enter(at / name, os.lstat(at / name), directory):
                case Link(target=target):
                    followed += 1
                    inside = Path(os.path.normpath(at / os.fsdecode(target)))
                    if followed > _MOST_LINKS or not inside.is_relative_to(self.tree.mountpoint):
                        raise ConfigurationError(f"{at / name}: leads out of the mount: {os.fsdecode(target)}")
                    parts = [*inside.relative_to(self.tree.mountpoint).parts, *parts]
                    at, directory = self.tree.mountpoint, self.tree.root
                case Directory() as below:
                    at, directory = at / name, below
                case File():
                    if parts:
                        raise NoSuchEntryError(f"{path}: {at / name} is no directory")
                    return
        self._fill(at, directory)

    def _fill(self, path: Path, directory: Directory) -> None:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name == CONTROL_NAME:
                    continue
                below = Path(entry.path)
                node = self._enter(below, entry.stat(follow_symlinks=False), directory)
                if isinstance(node, Directory):
                    self._fill(below, node)

    def _enter(self, path: Path, status: os.stat_result, directory: Directory) -> Node:
        """What a directory has at a path, which may be there already: without what is below it."""
        name = os.fsencode(path.name)
        if name not in directory.entries:
            directory.entries[name] = self._node(path, status)
        return directory.entries[name]

    def _node(self, path: Path, status: os.stat_result) -> Node:
        attributes = Attributes(stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid, status.st_mtime_ns)
        if stat.S_ISDIR(status.st_mode):
            return Directory(attributes)
        if stat.S_ISLNK(status.st_mode):
            self._links.append(path)
            return Link(attributes, os.fsencode(os.readlink(path)))
        file = File(attributes, status.st_size, partial(_read, path, status))
        self.tree.files += 1
        self.tree.file_bytes += status.st_size
        if status.st_size >= CHUNK:
            self._large.setdefault(status.st_ino, []).append((path, file))
        return file

    def choose(self, most: int) -> None:
        """Make the largest files devices; all links to one file have one device. Raises ConfigurationError."""
        for inode, links in sorted(self._large.items(), key=lambda found: -found[1][0][1].size)[:most]:
            path, file = links[0]
            self.tree.devices.append(Device(path, file.size // CHUNK * CHUNK, _generation_of(path, inode)))
            for _, each in links:
                each.device = len(self.tree.devices)
        for link in self._links:
            target = os.readlink(link)
            if not self._has(Path(os.path.normpath(link.parent / target))):
                raise ConfigurationError(f"{link}: leads to {target}, which the image would not have: name that, too")

    def _has(self, path: Path) -> bool:
        if not path.is_relative_to(self.tree.mountpoint):
            return False
        node: Node = self.tree.root
        for name in path.relative_to(self.tree.mountpoint).parts:
            if isinstance(node, Link):
                return True  # what that leads to is looked at, too
            if not isinstance(node, Directory) or (below := node.entries.get(os.fsencode(name))) is None:
                return False
            node = below
        return True


def check(devices: Sequence[Device]) -> None:
    """Raises ObjectChangedError if the mount has another file by now in place of one, other TrimsErrors if none."""
    for device in devices:
        if _generation_of(device.path) != device.generation:
            raise _replaced(device.path)


def _generation_of(path: Path, inode: int | None = None) -> str:
    """The generation of a file, which must have this number of an *inode*. Raises TrimsErrors."""
    try:
        with path.open("rb", buffering=0) as file:
            if inode not in {None, os.fstat(file.fileno()).st_ino}:
                raise _replaced(path)
            return os.fsdecode(os.getxattr(file.fileno(), GENERATION))
    except OSError as error:
        raise translated(error, path) from error


def _replaced(path: Path) -> ObjectChangedError:
    return ObjectChangedError(f"{path}: replaced in the store meanwhile: make the image again")


def _read(path: Path, known: os.stat_result, offset: int, length: int) -> bytes:
    """Bytes of a file from an offset on. Raises ObjectChangedError if it is another file by now."""
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            data = os.pread(file.fileno(), length, offset)
    except OSError as error:
        raise translated(error, path) from error
    if (status.st_ino, len(data)) != (known.st_ino, length):
        raise _replaced(path)
    return data
