"""The predecessor of a keeper: one that was killed or is stopped, and whose server still serves the mount.

That server has all that a keeper needs: the descriptors of /dev/fuse, of the ledger and of the locked cache directory,
and the order that the keeper started it with, as its standard input. The new keeper trusts none of this. An attacker in
the server can give it any title, and open any file that it may open. But an order is a sealed file of the keeper's
user, which the server can neither create nor change. And the kernel shows what each descriptor refers to.
"""

import fcntl
import json
import os
import select
import socket
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mountctl.keeper.control_socket import KeeperGoneError, KeeperSilentError, ask, titled
from mountctl.keeper.descriptor_store import FUSE_DEVICE, LISTENER
from mountctl.keeper.fuse_connection import SEALS, ledger_version
from mountctl.keeper.servers.forked_server import OtherProcess
from mountctl.keeper.servers.server_process import ALONE, ENVIRONMENT, FORKS, LAUNCHED, ServerProcess
from mountctl.linux import mounting
from mountctl.linux.sockets import gpu_path
from trimsfs.errors import NotMountedError, TakeoverError
from trimsfs.processes import shown, stopped, title_of
from trimsfs.text import title

RESENDS_SINCE = (6, 9)
"""The first version of Linux that resends the requests that a server has left unanswered."""
ORDER_LINK = "/memfd:trimsfs-order (deleted)"
ANSWER_TIMEOUT_S = 5.0
_NAMES = {"/memfd:trimsfs-ledger (deleted)": "ledger", "/dev/fuse": "fuse"}


class _UnfitError(Exception):
    """A process is not the server of the mount, or a keeper cannot take over from it."""


class LeftServer(ServerProcess):
    """The server that a keeper has left. The channel to it has ended: it serves until it is killed."""

    def __init__(self, process: OtherProcess, order: dict[str, Any], version: str) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.close()
        self._begin(order, ours)
        self._process, self._in_idle_time = process, False
        self.ledger_version, self.ready_at = version, time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Predecessor:
    """What a keeper has left: order, environment, server, and copies of the mount's descriptors, by name.

    *keeper* is that keeper if it is not killed, but stopped, or silent.
    """

    order: dict[str, Any]
    environment: dict[str, str]
    server: LeftServer
    keeper: OtherProcess | None
    descriptors: dict[str, int]


def find_predecessor(mountpoint: Path) -> Predecessor:
    """Find the predecessor of a new keeper of a mount. Raises NotMountedError, TakeoverError."""
    if _linux() < RESENDS_SINCE:
        raise TakeoverError(
            f"{mountpoint}: before Linux 6.9 no server can take over a mount: run `mountctl down` and `mountctl up`"
        )
    identity = mounting.identify(mountpoint)
    if identity is None:
        raise NotMountedError(f"{mountpoint}: no trimsfs mount")
    predecessors: list[Predecessor] = []
    unfit: list[str] = []
    for pid in titled("server", mountpoint):
        try:
            predecessors.append(_look_at(pid, mountpoint, identity.device))
        except PermissionError:
            unfit.append(f"{shown(pid)}: recovering needs root with CAP_SYS_PTRACE")
        except (_UnfitError, OSError) as error:
            unfit.append(f"{shown(pid)}: {error}")
    if len(predecessors) == 1:
        return predecessors[0]
    if predecessors:
        raise TakeoverError(f"{mountpoint}: several servers claim to serve it: run `mountctl down` and `mountctl up`")
    if unfit:
        raise TakeoverError(f"{mountpoint}: cannot be taken over from {unfit[0]}")
    others = [pid for pid in titled("keeper", mountpoint) if pid != os.getpid()]
    if others and stopped(others[0]):
        raise TakeoverError(
            f"{mountpoint}: its server has ended, and its keeper, {shown(others[0])}, is stopped: "
            f"run `kill -CONT {others[0]}`"
        )
    if others:
        raise TakeoverError(f"{mountpoint}: another keeper, {shown(others[0])}, is taking it over: wait")
    raise NotMountedError(
        f"{mountpoint}: its server has ended as well, and the connection to the kernel with it: "
        f"unmount it with `trimsfs umount {mountpoint}` and mount it again"
    )


def _linux() -> tuple[int, ...]:
    return tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])


def _look_at(pid: int, mountpoint: Path, device: str) -> Predecessor:
    """The predecessor whose server is this process, checked to serve the mount. Raises _UnfitError, OSError."""
    process = OtherProcess(os.pidfd_open(pid))
    order = _order_of(process)
    if order["mountpoint"] != str(mountpoint):
        raise _UnfitError("it serves another mount")
    if order.get(LAUNCHED, False):
        raise _UnfitError(f"its keeper is `mountctl keeper {mountpoint}`: start that again")
    keeper = _silent_keeper(pid, mountpoint)
    descriptors = _descriptors_of(process, order, device)
    if process.poll() is not None or not {"fuse", "ledger"} <= descriptors.keys():
        for descriptor in descriptors.values():
            os.close(descriptor)
        raise _UnfitError("it has ended, or does not have the descriptors of this mount")
    environment = order.pop(ENVIRONMENT)
    order.pop(FORKS, None)
    order.pop(ALONE, None)
    server = LeftServer(process, order, ledger_version(descriptors["ledger"]))
    return Predecessor(order=order, environment=environment, server=server, keeper=keeper, descriptors=descriptors)


def _silent_keeper(pid: int, mountpoint: Path) -> OtherProcess | None:
    """The keeper of a server, if it has one, which is stopped or hangs. Raises _UnfitError for another, and OSError."""
    parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    if title_of(parent) != title("keeper", mountpoint):
        return None
    if not stopped(parent) and not _is_silent(mountpoint):
        raise _UnfitError(f"its keeper, pid {parent}, is alive")
    return OtherProcess(os.pidfd_open(parent))


def _is_silent(mountpoint: Path) -> bool:
    """Whether the keeper of a mount listens and does not answer."""
    try:
        ask(mountpoint, {"do": "status"}, timeout_s=ANSWER_TIMEOUT_S)
    except KeeperGoneError as error:
        return isinstance(error, KeeperSilentError)
    return False


def _order_of(process: OtherProcess) -> dict[str, Any]:
    """The order that a keeper has started a server with. Raises _UnfitError, OSError."""
    descriptor = process.descriptor(0)
    try:
        status = os.fstat(descriptor)
        ours = os.readlink(f"/proc/self/fd/{descriptor}") == ORDER_LINK and status.st_uid == os.geteuid()
        if not ours or fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise _UnfitError("it was not started by a keeper of this user and version")
        order: dict[str, Any] = json.loads(os.pread(descriptor, status.st_size, 0))
        return order
    finally:
        os.close(descriptor)


def _descriptors_of(process: OtherProcess, order: dict[str, Any], device: str) -> dict[str, int]:
    """The descriptors of the mount on a device that a process has, by name. Raises OSError."""
    names = _NAMES | {str(Path(order["options"]["cache_dir"], "lock").resolve()): "lock"}
    descriptors: dict[str, int] = {}
    for number in map(int, os.listdir(f"/proc/{process.pid}/fd")):
        try:
            link = os.readlink(f"/proc/{process.pid}/fd/{number}")
            name = names.get(link, LISTENER if link.startswith("socket:") else "")
            if not name or name in descriptors:
                continue
            descriptor = process.descriptor(number)
        except PermissionError:
            raise
        except OSError:
            continue  # closed meanwhile
        if fits(name, descriptor, order, device):
            descriptors[name] = descriptor
        else:
            os.close(descriptor)
    return descriptors


def fits(name: str, descriptor: int, order: dict[str, Any], device: str) -> bool:
    """Whether a descriptor is what *name* says. Raises OSError."""
    status = os.fstat(descriptor)
    match name:
        case "ledger":
            return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
        case "fuse":
            return _serves(descriptor, device)
        case "lock":
            return _locks(descriptor, Path(order["options"]["cache_dir"], "lock"))
        case _:
            return _listens(descriptor, gpu_path(Path(order["mountpoint"])))


def _serves(fuse: int, device: str) -> bool:
    """Whether a descriptor is of /dev/fuse, and of the mount on a device; before Linux 6.18, of any mount."""
    status = os.fstat(fuse)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != FUSE_DEVICE:
        return False
    poll = select.poll()
    poll.register(fuse, 0)
    if poll.poll(0):
        return False  # mounted nowhere
    for line in Path(f"/proc/self/fdinfo/{fuse}").read_text().splitlines():
        what, _, number = line.partition(":\t")
        if what == "fuse_connection":
            return number == device.partition(":")[2]
    return True


def _locks(descriptor: int, lock: Path) -> bool:
    """Whether a descriptor has the lock of a cache directory."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), lock.stat())
    except OSError:
        return False


def _listens(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is the socket of GPU clients."""
    with socket.socket(fileno=os.dup(descriptor)) as end:
        listening = end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return bool(listening) and end.family == socket.AF_UNIX and end.getsockname() == str(path)
