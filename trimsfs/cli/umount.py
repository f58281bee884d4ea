"""``trimsfs umount``: unmounts, and waits until the processes of the mount have ended."""

import errno
import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from trimsfs.cli.control_client import check_answers, read_json
from trimsfs.cli.output import fail, reported, say
from trimsfs.command_group import complete_mounted, examples
from trimsfs.errors import InUseError, MountpointError, NotMountedError, NotPermittedError, TrimsError
from trimsfs.mount_namespaces import detach, namespaces, outliving, overlays
from trimsfs.mountinfo import Mount, canonical, mount_at, mount_of, mounts, trimsfs_at
from trimsfs.polling import readable
from trimsfs.processes import Usage, usage

STOP_TIMEOUT_S = 20.0
"""How long the processes of a mount may take to end."""
ENDING_INTERVAL_S = 0.02
PATIENCE_S = 0.5
"""How long a copy of a mount in another mount namespace, or who holds a mount for a moment, may take to go."""
CONNECTION_TIMEOUT_S = 3.0
"""How long the kernel may keep a connection after the unmount: it frees mount namespaces in the background."""
CONNECTIONS = Path("/sys/fs/fuse/connections")


@click.command(epilog=examples("trimsfs umount /models", "trimsfs umount --everywhere /models"))
@click.argument("mountpoint", type=Path, shell_complete=complete_mounted)
@click.option("--lazy", is_flag=True, help="Detach now; open files go on working until they are closed.")
@click.option(
    "--everywhere", is_flag=True, help="Also unmount it in containers, and its bind mounts on this host; needs root."
)
@reported
def umount(mountpoint: Path, lazy: bool, everywhere: bool) -> None:
    """Unmount MOUNTPOINT and end its server.

    A mount that is in use stays, with exit code 12; the message names the processes, mounts and containers that use it.
    """
    mountpoint = canonical(mountpoint)
    mount = trimsfs_at(mountpoint)
    if mount is None:
        on = mount_of(mountpoint)
        hint = f", but a path on the one at {on.mountpoint}" if on is not None else ""
        raise NotMountedError(f"{mountpoint}: no trimsfs mount{hint}")
    facts = None if lazy else _facts(mountpoint)
    if facts is not None and not everywhere and not _is_at(mountpoint, facts):
        _unmount(mount, lazy=False)  # a bind mount, or another namespace's: the file system stays
        return
    processes = _processes(facts) if facts is not None else []
    if everywhere or not lazy:
        _check_others(mount, everywhere=everywhere, lazy=lazy)
    layered = _places(overlays(mount, namespaces()[0])) if lazy else []  # afterwards no table leads to them
    connection = _connection(mount)
    _unmount(mount, lazy=lazy, connection=connection)
    ends, held = _ends(mount, connection, 0 if lazy else CONNECTION_TIMEOUT_S), Usage()
    if not ends:
        held = _held(mount, layered)
        if not lazy and not (held.processes or held.mounted):  # the last user, or its mount namespace, has just ended
            ends = _ends(mount, connection, CONNECTION_TIMEOUT_S)
    if not ends:
        goes_on = f"its server runs on, and keeps its cache, while it is in use {held}"
        if not lazy:
            raise InUseError(f"{mountpoint} is unmounted, but {goes_on}")
        say(f"trimsfs: {mountpoint} is detached; {goes_on}", error=True)
    _wait(mount, processes)


def _facts(mountpoint: Path) -> dict[str, Any] | None:
    """The facts that the server reports; None if it does not answer."""
    try:
        check_answers(mountpoint)
        return read_json(mountpoint / ".trims/control")
    except TrimsError:
        say(f"trimsfs: {mountpoint} does not answer: not waiting for its server to end", error=True)
        return None


def _is_at(mountpoint: Path, facts: dict[str, Any]) -> bool:
    """Whether this is the mount that its keeper made, in the keeper's mount namespace; a server may have another.

    Without a keeper, the namespace is not known: a mount at this path is taken for that one.
    """
    with suppress(OSError):
        keeper = facts["keeper_pid"]
        if keeper is not None and os.readlink(f"/proc/{keeper}/ns/mnt") != os.readlink("/proc/self/ns/mnt"):
            return False
    return bool(facts["mountpoint"] == str(mountpoint))


def _check_others(mount: Mount, *, everywhere: bool, lazy: bool) -> None:
    """Find the mounts that an unmount would leave, in all mount namespaces; unmount them if *everywhere*.

    An overlay over the mount is never unmounted, as it may be the root of a container: unless *lazy*, it keeps all.
    Waits up to PATIENCE_S for containers that start or end, and for who looks at all mounts. Raises InUseError,
    NotPermittedError.
    """
    if everywhere and os.geteuid() != 0:
        raise NotPermittedError("--everywhere: only root can unmount in other mount namespaces")
    deadline = time.monotonic() + PATIENCE_S
    while everywhere and not lazy and (held := usage(mount.device)).processes:
        if time.monotonic() > deadline:
            raise InUseError(f"{mount.mountpoint} is in use {held}: end that, or use --lazy")
        time.sleep(ENDING_INTERVAL_S)
    failed: dict[int, OSError] = {}
    deadline = time.monotonic() + PATIENCE_S
    while True:
        places = namespaces()[0]
        left, layered = outliving(mount, places), [] if lazy else overlays(mount, places)
        if not (left or layered):
            return
        for pid, each in reversed(left) if everywhere and not layered else ():  # the mount that covers another first
            try:
                detach(pid, each)
            except OSError as error:
                failed[each.number] = error
        if time.monotonic() > deadline:
            break
        time.sleep(ENDING_INTERVAL_S)
    if not lazy:
        reason = failed.get(left[0][1].number) if left else None
        locked = reason is not None and reason.errno == errno.EINVAL
        why = "" if reason is None else ": locked in a user namespace" if locked else f": {reason.strerror}"
        remedy = "--lazy" if everywhere or layered else "--everywhere"
        held = Usage(mounted=_places(left), overlays=_places(layered))
        raise InUseError(f"{mount.mountpoint} is in use {held}{why}: end that, or use {remedy}")


def _places(mounted: list[tuple[int, Mount]]) -> list[tuple[int, Path]]:
    """Where mounts are, each with a process of its mount namespace."""
    return [(pid, each.mountpoint) for pid, each in mounted]


def _held(mount: Mount, layered: list[tuple[int, Path]]) -> Usage:
    """Who uses a mount that is detached; *layered* are the overlays that were there before."""
    held = usage(mount.device)
    held.mounted[:0] = [(os.getpid(), each.mountpoint) for each in mounts(None) if each.device == mount.device]
    held.overlays += layered
    return held


def _unmount(mount: Mount, *, lazy: bool, connection: int | None = None) -> None:
    """Unmount; a busy mount is tried again for PATIENCE_S, as who looks at all mounts holds each for a moment.

    Raises InUseError, NotPermittedError, MountpointError.
    """
    mountpoint = mount.mountpoint
    deadline = time.monotonic() + PATIENCE_S
    while said := _umount(mount, lazy=lazy, connection=connection):
        if "not found in" in said or "must be superuser" in said:
            raise NotPermittedError(f"{mountpoint} was mounted by another user: only that user and root can unmount it")
        if "busy" not in said:
            raise MountpointError(f"{mountpoint}: {said}")
        if time.monotonic() > deadline:
            raise InUseError(f"{mountpoint} is in use {_users(mount)}: end that, or use --lazy")
        time.sleep(ENDING_INTERVAL_S)
        there = mount_at(mountpoint)
        if there is None or there.number != mount.number:
            return  # another has unmounted it


def _umount(mount: Mount, *, lazy: bool, connection: int | None) -> str:
    """What the system's own command says on failure, or nothing.

    It returns once the *connection* has ended, though the kernel may free cached names for seconds more.
    """
    if os.geteuid() == 0:
        options = ["--internal-only", "--no-canonicalize", *(["--lazy"] if lazy else [])]
        command = ["umount", *options, str(mount.mountpoint)]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), "--", str(mount.mountpoint)]
    environment = {**os.environ, "LC_ALL": "C"}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and (connection is None or connection == _connection(mount)):
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDING_INTERVAL_S)
    if not process.poll():
        return ""
    return process.communicate()[1].strip() or f"{command[0]} failed with exit code {process.returncode}"


def _users(mount: Mount) -> str:
    """What keeps a mount busy, for an error message."""
    above = [str(each.mountpoint) for each in mounts(None) if each.parent == mount.number]
    return f"by what is mounted on it, {', '.join(above)}" if above else str(usage(mount.device))


def _connection(mount: Mount) -> int | None:
    """An id that tells a FUSE connection from later ones of its number; None once it has ended, or without fusectl."""
    with suppress(OSError):
        return (CONNECTIONS / mount.device.partition(":")[2]).stat().st_ino
    return None


def _ends(mount: Mount, connection: int | None, timeout_s: float) -> bool:
    """Whether a FUSE connection ends in time; True if it is not known."""
    deadline = time.monotonic() + timeout_s
    while connection is not None and connection == _connection(mount):
        if time.monotonic() >= deadline:
            return False
        time.sleep(ENDING_INTERVAL_S)
    return True


def _processes(facts: dict[str, Any]) -> list[int]:
    """Pidfds of a mount's processes."""
    descriptors: list[int] = []
    for name in ("server_pid", *(() if facts.get("keeper_stays", False) else ("keeper_pid",))):
        if facts[name] is not None:  # the keeper is gone
            with suppress(OSError):
                descriptors.append(os.pidfd_open(facts[name]))
    return descriptors


def _wait(mount: Mount, processes: list[int]) -> None:
    """Wait until the processes of the unmounted file system have ended; fail after STOP_TIMEOUT_S."""
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while processes:
        ended = readable(processes, deadline - time.monotonic())
        if not ended:
            still = f"{mount.mountpoint} is unmounted, but its server has not ended in {STOP_TIMEOUT_S:.0f} s"
            fail("", f"{still}: it is used {_held(mount, [])}")
        processes = [process for process in processes if process not in ended]
