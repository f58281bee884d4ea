"""What /proc tells of processes: which belong to a mount, and which use one. Nothing here waits for a mount."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trimsfs.mountinfo import mounts
from trimsfs.text import TITLE_PREFIX, printable

SHOWN = 5
"""How many users of a mount a message names."""


def title_of(pid: int) -> str:
    """The title of a process of a mount, as ``trimsfs server /models``; the program's name of any other."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0")
        if not title.startswith(TITLE_PREFIX):
            title = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return "ended"
    return printable(title)


def shown(pid: int) -> str:
    """A process, for messages."""
    return f"pid {pid} ({title_of(pid)})"


def roles(keeper: int | None) -> dict[str, int]:
    """How many processes of each role this server's mount has; None for a keeper that is gone."""
    pids = {*_family(os.getpid()), *(_family(keeper) if keeper is not None else ())}
    titles = [title_of(pid) for pid in sorted(pids)]
    return dict(Counter(title.split(" ")[1] for title in titles if title.startswith(TITLE_PREFIX)))


def _family(pid: int) -> list[int]:
    """A process and all below it, as far as the kernel tells."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(below for child in children for below in _family(int(child)))]


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    directory = "/proc/self/fd"
    return os.stat(directory).st_size or len(os.listdir(directory))  # the size is 0 before Linux 6.2


@dataclass(slots=True)
class Usage:
    """Who uses a file system, or one file of it.

    ``processes`` have something of it open or mapped, or are in one of its directories. ``mounted`` is where it is
    mounted in other mount namespaces, each with a process of that namespace. ``hidden``: this user may not look at
    some processes.
    """

    processes: list[int] = field(default_factory=list)
    mounted: list[tuple[int, Path]] = field(default_factory=list)
    hidden: bool = False

    def __str__(self) -> str:
        """For messages: by whom, or that the kernel does not tell."""
        users = [shown(pid) for pid in self.processes]
        users += [f"the mount at {path} in the namespace of {shown(pid)}" for pid, path in self.mounted]
        if len(users) > SHOWN:
            users[SHOWN:] = [f"{len(users) - SHOWN} more"]
        if users:
            return f"by {', '.join(users)}"
        return "by a process that only root can see" if self.hidden else "by whom the kernel does not tell"


def usage(device: str, inode: int | None = None) -> Usage:
    """Who uses the file system of a *device*, ``major:minor``, or its file of this inode number."""
    found = Usage()
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    numbers = {mount.number for mount in mounts() if mount.device == device}
    namespaces = {os.readlink("/proc/self/ns/mnt")}
    for pid in pids:
        with _looking(found):
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace not in namespaces:
                namespaces.add(namespace)
                there = [mount for mount in mounts(process=pid) if mount.device == device]
                numbers |= {mount.number for mount in there}
                found.mounted += [(pid, mount.mountpoint) for mount in there]
    for pid in pids:
        with _looking(found):
            if (
                _has_open(pid, numbers, inode)
                or _has_mapped(pid, device, inode)
                or (inode is None and _is_in(pid, numbers))
            ):
                found.processes.append(pid)
    return found


@contextmanager
def _looking(usage: Usage) -> Iterator[None]:
    """Look at a process, which may be another user's, or end meanwhile."""
    try:
        yield
    except PermissionError:
        usage.hidden = True
    except (OSError, ValueError):
        pass  # it has ended


def _has_open(pid: int, numbers: set[int], inode: int | None) -> bool:
    """Whether a process has a file open on one of these mounts. `stat` of a descriptor would ask the server."""
    for descriptor in os.listdir(f"/proc/{pid}/fdinfo"):
        try:
            facts = _facts(f"/proc/{pid}/fdinfo/{descriptor}")
        except FileNotFoundError:
            continue  # closed meanwhile
        if int(facts["mnt_id"]) in numbers and inode in {None, int(facts.get("ino", "0"))}:
            return True
    return False


def _is_in(pid: int, numbers: set[int]) -> bool:
    """Whether the working or the root directory of a process lies on one of these mounts."""
    for name in ("cwd", "root"):
        directory = os.open(f"/proc/{pid}/{name}", os.O_PATH | os.O_CLOEXEC)
        try:
            if int(_facts(f"/proc/self/fdinfo/{directory}")["mnt_id"]) in numbers:
                return True
        finally:
            os.close(directory)
    return False


def _facts(fdinfo: str) -> dict[str, str]:
    lines = Path(fdinfo).read_text(errors="replace").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def _has_mapped(pid: int, device: str, inode: int | None) -> bool:
    major, minor = map(int, device.split(":"))
    wanted = f"{major:02x}:{minor:02x}"
    with Path(f"/proc/{pid}/maps").open(errors="replace") as maps:
        for line in maps:
            _, _, _, mapped, number, *_ = line.split(None, 5)
            if mapped == wanted and inode in {None, int(number)}:
                return True
    return False
