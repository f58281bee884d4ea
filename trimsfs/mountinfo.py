"""Lists and finds mounts by ``/proc/self/mountinfo``, without touching any mount."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

FILE_SYSTEM_TYPE = "fuse.trimsfs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mount. ``device`` is ``major:minor``; ``parent`` is the number of the mount that it is mounted on.

    ``root`` is the directory of the file system that is mounted: ``/``, or a subdirectory for a bind mount. The kernel
    appends ``//deleted`` when that directory has been removed. ``shared`` and ``master`` are the peer groups to which
    mounts made below it propagate and from which they come; 0 for none. ``user`` made a mount of FUSE, as the kernel
    has checked; 0 for others. ``layers`` are the absolute paths of an overlay's lower layers, as whoever mounted it
    named them.
    """

    number: int
    parent: int
    mountpoint: Path
    device: str
    kind: str
    source: str
    root: str = "/"
    shared: int = 0
    master: int = 0
    user: int = 0
    layers: tuple[Path, ...] = ()


def mounts(
    kind: str | None = FILE_SYSTEM_TYPE, *, at: Iterable[Path] | None = None, process: int | str = "self"
) -> list[Mount]:
    """The mounts of a type, or of all, in a process's mount namespace; a covering mount comes after the one it covers.

    With *at*, those at these paths only: that is quick also where a node has thousands.
    """
    places = None if at is None else {_escaped(path) for path in at}
    entries = []
    # As bytes: the kernel escapes the newline alone, and text would also end lines at carriage returns in paths.
    table = Path(f"/proc/{process}/mountinfo").read_bytes().decode(errors="surrogateescape")
    for line in table.rstrip("\n").split("\n"):
        fields, _, rest = line.partition(" - ")
        number, parent, device, root, mountpoint, _, *optional = fields.split(" ")
        file_system_type, source, *options = rest.split(" ")
        if (places is not None and mountpoint not in places) or kind not in {None, file_system_type}:
            continue
        groups = dict(field.split(":") for field in optional if ":" in field)
        entries.append(
            Mount(
                number=int(number),
                parent=int(parent),
                mountpoint=Path(_unescape(mountpoint)),
                device=device,
                kind=file_system_type,
                source=_unescape(source),
                root=_unescape(root),
                shared=int(groups.get("shared", 0)),
                master=int(groups.get("master", 0)),
                user=_user(options[0]) if options and file_system_type.startswith("fuse") else 0,
                layers=_layers(options[0]) if options and file_system_type == "overlay" else (),
            )
        )
    return entries


def file_systems() -> list[Mount]:
    """One mount of each trimsfs file system: the first of its root or, without one (as in a container), the first."""
    by_device: dict[str, Mount] = {}
    for mount in mounts():
        known = by_device.setdefault(mount.device, mount)
        if known.root != "/" and mount.root == "/":
            by_device[mount.device] = mount
    return list(by_device.values())


def canonical(mountpoint: Path) -> Path:
    """A mount point as the kernel lists it, resolved without touching the mount; a path on a mount stays as it is."""
    absolute = Path(os.path.abspath(mountpoint))
    if mount_of(absolute) is not None:
        return absolute
    beside = Path(os.path.realpath(absolute.parent), absolute.name)
    return beside if mount_at(beside) is not None else Path(os.path.realpath(absolute))


def named_mountpoint(path: Path) -> Path:
    """The mount point of the trimsfs mount that a path lies on; the `canonical` path if it lies on none."""
    path = canonical(path)
    mount = mount_of(path)
    return path if mount is None else mount.mountpoint


def mount_at(mountpoint: Path) -> Mount | None:
    """The mount at exactly this path, if any."""
    return next(reversed(mounts(None, at=[mountpoint])), None)


def trimsfs_at(mountpoint: Path) -> Mount | None:
    """The trimsfs mount at exactly this path, if any, unless another mount covers it."""
    mount = mount_at(mountpoint)
    return mount if mount is not None and mount.kind == FILE_SYSTEM_TYPE else None


def mount_of(path: Path) -> Mount | None:
    """The trimsfs mount that an absolute path without symbolic links lies on, if any."""
    mount = holding(path)
    return mount if mount is not None and mount.kind == FILE_SYSTEM_TYPE else None


def holding(path: Path) -> Mount | None:
    """The mount of any type that an absolute path without symbolic links lies on; None for a hidden path."""
    over = mounts(None, at=(path, *path.parents))
    numbers = {mount.number for mount in over}
    # Walk down from the root, into the first mount on the way: a path cannot reach mounts below a covered one.
    here = [mount for mount in over if mount.parent not in numbers - {mount.number}]
    innermost = None
    while here:
        innermost = min(here, key=lambda mount: len(mount.mountpoint.parts))
        here = [mount for mount in over if mount.parent == innermost.number != mount.number]
    return innermost


def escape(mountpoint: Path) -> str:
    """A mount point as one file name: ``/mnt/models`` is ``mnt-models``, a literal ``-`` is ``%2D``."""
    name = str(mountpoint).removeprefix("/").replace("%", "%25").replace("-", "%2D").replace("/", "-")
    return name or "-"


def _user(options: str) -> int:
    """The user who made a mount of FUSE, by the options of its file system."""
    return next((int(option[8:]) for option in options.split(",") if option.startswith("user_id=")), 0)


def _layers(options: str) -> tuple[Path, ...]:
    """The absolute lower layers in the options of an overlay: ``lowerdir=/a:/b``, or one each in ``lowerdir+=``."""
    layers: list[str] = []
    for name, _, value in (option.partition("=") for option in options.split(",")):
        if name == "lowerdir":
            layers += [re.sub(r"\\(.)", r"\1", layer) for layer in re.findall(r"(?:\\.|[^:\\])+", _unescape(value))]
        elif name in {"lowerdir+", "datadir+"}:
            layers.append(_unescape(value))
    return tuple(Path(layer) for layer in layers if layer.startswith("/"))


def _escaped(path: Path) -> str:
    """A path as the kernel writes it."""
    return re.sub(r"[ \t\n\\]", lambda match: f"\\{ord(match[0]):03o}", str(path))


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def lies_on(directory: Path, kind: str) -> bool:
    """Whether a directory is on a file system of this kind."""
    mount = holding(directory.resolve())
    return mount is not None and mount.kind == kind
