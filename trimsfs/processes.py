"""Reads from /proc which processes belong to a mount, and which use one. Never waits for a mount."""

import ctypes
import os
import re
import signal
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from trimsfs.mount_namespaces import namespaces
from trimsfs.text import TITLE_PREFIX, printable

LOOK_INTERVAL_S = 1.0
"""How often processes look whether one that they need runs."""
MOST_LOOKS = 3
"""So many looks must find a process stopped: it may be stopped for a moment, or together with whoever looks."""
SHOWN = 5
"""How many users of a mount a message names."""
FORK_PATIENCE_S, FORK_PAUSE_S = 30.0, 0.1
_CONTAINER = re.compile(r"([0-9a-f]{12})[0-9a-f]{52}")
"""The container's identifier, which engines put into the name of its control group."""
_PR_SET_PDEATHSIG = 1
_AT_FDCWD, _AT_STATX_DONT_SYNC = -100, 0x4000
_INODE, _DEVICE = struct.Struct("=32xQ"), struct.Struct("=136xII")
"""Where a ``struct statx`` has a file's inode number, and the numbers of its device."""

_libc = ctypes.CDLL(None, use_errno=True)


def title_of(pid: int) -> str:
    """The title of a mount's process, such as ``trimsfs server /models``; for others, the program's name."""
    try:
        title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0")
        if not title.startswith(TITLE_PREFIX):
            title = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return "ended"
    return printable(title)


def process_of(thread: int) -> int:
    """The process that a thread belongs to; the thread itself once it has ended, or if the kernel hides it."""
    try:
        # As bytes: text would also end lines at carriage returns, which a program's name may have.
        status = Path(f"/proc/{thread}/status").read_bytes().decode(errors="replace")
        return int(status.partition("\nTgid:")[2].split(None, 1)[0])
    except (OSError, IndexError, ValueError):
        return thread


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this PID namespace, distinguished from later ones of its *pid* by when it *started*, in clock
    ticks."""

    pid: int
    started: int

    @property
    def runs(self) -> bool:
        """Whether it has not ended, so far as the kernel tells."""
        status = _status_of(self.pid)
        return status is not None and status[0] == self


def lineage(pid: int) -> Iterator[tuple[Process, str]]:
    """A process and those above it, each with its program's name, up to one that the kernel does not show."""
    seen = set[int]()
    while pid and pid not in seen:
        seen.add(pid)
        status = _status_of(pid)
        if status is None:
            return
        process, parent, name = status
        yield process, name
        pid = parent


def _status_of(pid: int) -> tuple[Process, int, str] | None:
    """A process, its parent's pid and its program's name; None if it has ended, or the kernel hides it."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        head, _, tail = status.rpartition(")")
        fields = tail.split()
        return Process(pid, int(fields[19])), int(fields[1]), head.partition("(")[2]
    except (OSError, IndexError, ValueError):
        return None


def exists(thread: int) -> bool:
    """Whether a process or thread exists, also one that /proc hides from this user."""
    try:
        os.kill(thread, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def stopped(pid: int) -> bool:
    """Whether a process is stopped, by a signal or a debugger, so far as the kernel tells."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in {"T", "t"}


class StopWatch:
    """Tells a process that stays stopped from one that goes on soon, for whoever looks each LOOK_INTERVAL_S.

    It counts looks, not time: while all processes of a host are frozen, no look passes.
    """

    def __init__(self) -> None:
        self._looks, self._looked_at = 0, -LOOK_INTERVAL_S

    def stays_stopped(self, pid: int) -> bool:
        """Look at the process; whether the last MOST_LOOKS looks have found it stopped."""
        now = time.monotonic()
        if not stopped(pid):
            self._looks = 0
        elif now - self._looked_at >= 0.9 * LOOK_INTERVAL_S:
            self._looks, self._looked_at = self._looks + 1, now
        return self._looks >= MOST_LOOKS


def shown(pid: int) -> str:
    """A process, for messages: its pid, its program and, if known, its container."""
    container = container_of(pid)
    return f"pid {pid} ({title_of(pid)}{f', container {container}' if container else ''})"


def container_of(pid: int) -> str | None:
    """The identifier of a process's container, the innermost one, as engines show it; None if its control group names
    none."""
    try:
        identifiers = _CONTAINER.findall(Path(f"/proc/{pid}/cgroup").read_text(errors="replace"))
    except OSError:
        return None
    return identifiers[-1] if identifiers else None


def roles(keeper: int | None) -> dict[str, int]:
    """How many processes of each role this server's mount has; *keeper* is None if the keeper is gone."""
    pids = {*_family(os.getpid()), *(_family(keeper) if keeper is not None else ())}
    titles = [title_of(pid) for pid in sorted(pids)]
    return dict(Counter(title.split(" ")[1] for title in titles if title.startswith(TITLE_PREFIX)))


def _family(pid: int) -> list[int]:
    """The pids of a process and its descendants, as far as the kernel lists them."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(below for child in children for below in _family(int(child)))]


def end_with_parent() -> None:
    """Make the kernel kill this process when its parent ends."""
    _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)


def fork_patiently() -> int:
    """`os.fork`, tried for FORK_PATIENCE_S while the system has no room for another process. Raises OSError."""
    give_up_at = time.monotonic() + FORK_PATIENCE_S
    while True:
        try:
            return os.fork()
        except OSError:
            if time.monotonic() >= give_up_at:
                raise
        time.sleep(FORK_PAUSE_S)


def start_child(work: Callable[[int], object]) -> tuple[int, int]:
    """Fork a child that does *work* with a descriptor to write to, and ends with it or with this process.

    Returns the descriptor at which this process reads, and the child's pid. Raises OSError.
    """
    receiver, sender = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            try:
                end_with_parent()
                work(sender)
            finally:
                os._exit(0)
    except OSError:
        os.close(receiver)
        raise
    finally:
        os.close(sender)
    return receiver, pid


@cache
def may_rise() -> bool:
    """Whether a process like this one may raise its priority again after it has lowered it: a thread tries."""
    risen: list[bool] = []

    def rise() -> None:
        before = os.getpriority(os.PRIO_PROCESS, 0)
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, before + 1)
            os.setpriority(os.PRIO_PROCESS, 0, before)
            risen.append(True)

    thread = threading.Thread(target=rise)
    thread.start()
    thread.join()
    return bool(risen)


def prioritise(pid: int, niceness: int, *, session: int) -> None:
    """Set the niceness of all threads of a process, and of its *session* where the kernel shares cores by session.

    Raises OSError if that is not allowed, BlockingIOError if the kernel wants to be asked again in a while.
    """
    for thread in os.listdir(f"/proc/{pid}/task"):
        with suppress(ProcessLookupError):  # it has ended
            os.setpriority(os.PRIO_PROCESS, int(thread), niceness)
    autogroup = Path(f"/proc/{pid}/autogroup")
    with suppress(FileNotFoundError):
        if autogroup.read_text().split()[-1:] != [str(session)]:
            autogroup.write_text(str(session))


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    directory = "/proc/self/fd"
    return os.stat(directory).st_size or len(os.listdir(directory))  # the size is 0 before Linux 6.2


def device_served_by(pid: int) -> str | None:
    """The device of the FUSE file system that a process serves; None if it serves none, or before Linux 6.18."""
    for facts in Path(f"/proc/{pid}/fdinfo").glob("*"):
        with suppress(OSError):  # closed meanwhile
            for line in facts.read_text().splitlines():
                what, _, number = line.partition(":\t")
                if what == "fuse_connection":
                    return f"0:{number}"
    return None


@dataclass(slots=True)
class Usage:
    """Who uses a file system, or one file of it.

    ``processes`` have something of it open or mapped, or are in one of its directories. ``mounted`` is where else it is
    mounted, and ``overlays`` have it as a lower layer, each with a process of that mount namespace. ``hidden``: this
    user may not look at some processes.
    """

    processes: list[int] = field(default_factory=list)
    mounted: list[tuple[int, Path]] = field(default_factory=list)
    overlays: list[tuple[int, Path]] = field(default_factory=list)
    hidden: bool = False

    def __str__(self) -> str:
        """The users, for messages that say "in use"."""
        users = [shown(pid) for pid in self.processes]
        own = os.getpid()
        users += [
            f"the {what} at {path}{f' in the mount namespace of {shown(pid)}' if pid != own else ''}"
            for what, places in (("overlay", self.overlays), ("mount", self.mounted))
            for pid, path in places
        ]
        if len(users) > SHOWN:
            users[SHOWN:] = [f"{len(users) - SHOWN} more"]
        if users:
            return f"by {', '.join(users)}"
        return "by a process that only root can see" if self.hidden else "by a process that the kernel does not show"


def usage(device: str, inode: int | None = None) -> Usage:
    """Find who uses the file system of a *device*, ``major:minor``, or only its file of this inode number."""
    used = Usage()
    others, used.hidden = namespaces()
    others.pop(os.getpid())
    used.mounted = [(pid, mount.mountpoint) for pid in others for mount in others[pid] if mount.device == device]
    for pid in _processes():
        try:
            if any(file[0] == device and inode in {None, file[1]} for file in _files(pid, whole=inode is None)):
                used.processes.append(pid)
        except PermissionError:
            used.hidden = True
        except (OSError, ValueError):
            pass  # it has ended
    used.hidden &= os.geteuid() != 0  # root sees all that the kernel shows
    return used


def holders(device: str) -> dict[int, list[int]]:
    """The processes that have files of a file system open or mapped, by inode number, as far as this user may see."""
    pids_by_inode: dict[int, list[int]] = {}
    for pid in _processes():
        with suppress(OSError, ValueError):  # it has ended, or is another user's
            for inode in {file[1] for file in _files(pid) if file[0] == device}:
                pids_by_inode.setdefault(inode, []).append(pid)
    return pids_by_inode


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def _files(pid: int, *, whole: bool = False) -> Iterator[tuple[str, int]]:
    """The device and inode number of each file that a process has open or mapped and, with *whole*, of its working
    and root directories."""
    links = [f"fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]
    for link in [*links, *(("cwd", "root") if whole else ())]:
        with suppress(FileNotFoundError):  # closed meanwhile
            yield _file_at(f"/proc/{pid}/{link}")
    yield from (file[:2] for file in _mapped(pid))


def _mapped(pid: int) -> Iterator[tuple[str, int, str]]:
    """The device, inode number and path of each mapping of a file in a process."""
    with Path(f"/proc/{pid}/maps").open(errors="replace", newline="\n") as maps:  # paths may have carriage returns
        for line in maps:
            _, _, _, device, inode, *path = line.rstrip("\n").split(None, 5)
            if inode != "0":  # a file's
                major, minor = (int(number, 16) for number in device.split(":"))
                yield f"{major}:{minor}", int(inode), "".join(path)


def _file_at(link: str) -> tuple[str, int]:
    """The device and the inode number of an open file. `stat` would ask the server of its mount."""
    status = ctypes.create_string_buffer(256)
    if _libc.statx(_AT_FDCWD, link.encode(), _AT_STATX_DONT_SYNC, 0, status) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    major, minor = _DEVICE.unpack_from(status)
    return f"{major}:{minor}", _INODE.unpack_from(status)[0]


def open_paths(device: str) -> dict[int, set[str]]:
    """The processes that have files of a *device* open or mapped, with the paths by which they know these. Leaves out
    processes that this user may not look at."""
    paths_by_pid: dict[int, set[str]] = {}
    for pid in _processes():
        with suppress(OSError, ValueError):  # it has ended, or is another user's
            paths = {path for mapped_device, _, path in _mapped(pid) if mapped_device == device}
            for number in os.listdir(f"/proc/{pid}/fd"):
                link = f"/proc/{pid}/fd/{number}"
                with suppress(FileNotFoundError):
                    if _file_at(link)[0] == device:
                        paths.add(os.readlink(link))
            if paths:
                paths_by_pid[pid] = paths
    return paths_by_pid
