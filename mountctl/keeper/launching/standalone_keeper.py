"""The standalone keeper: its servers come from elsewhere, as from another container, and its mount outlives it.

`trimsfs serve` joins it, starts its servers and keeps copies of its descriptors. A server, its container and the keeper
may each end at any time: whoever is left has what the next one needs.
"""

import contextlib
import fcntl
import os
import signal
import time
from pathlib import Path

from mountctl.keeper import limits
from mountctl.keeper.fuse_connection import AlreadyKeptError, ledger_version
from mountctl.keeper.keeper import STOP_SIGNALS, Keeper
from mountctl.keeper.launching.launcher_socket import SERVER, succeed
from mountctl.keeper.launching.launchers import Launcher, Launchers
from mountctl.keeper.reporter import Reporter
from mountctl.keeper.servers.forked_server import OtherProcess
from mountctl.keeper.succession.predecessor import LeftServer, fits
from mountctl.linux import mounting
from mountctl.linux.sd_notify import Notifier
from mountctl.linux.sockets import ListenError
from trimsfs.errors import MountpointError, TakeoverError
from trimsfs.mountinfo import trimsfs_at

GRACE_S = 1.0
"""How long a new keeper of a mount that is there waits for the launcher that has kept it."""
ANSWER_TIMEOUT_S = 2.0
"""How long a mount that was left may take to show whether it is dead."""
KEPT_TIMEOUT_S = 5.0
"""How long the keeper before may take to end."""


def _taken_from(launcher: Launcher) -> tuple[dict[str, int], LeftServer | None]:
    """What a launcher has kept of a mount that is still there, by name, and the server that is left, if one is.

    Raises OSError, AlreadyKeptError.
    """
    held, launcher.held = launcher.held, {}
    mountpoint = Path(launcher.order["mountpoint"])
    identity = mounting.identify(mountpoint)
    try:
        fit = identity is not None and all(
            fits(name, held[name], launcher.order, identity.device) for name in held.keys() - {"lock", SERVER}
        )
        process = OtherProcess(held[SERVER]) if fit and held.keys() >= {"fuse", "ledger", "lock", SERVER} else None
    except (OSError, ValueError):
        process = None  # they are not what their names say
    if process is None:
        _close(held)
        _prepare(mountpoint)
        return {}, None
    if not _unlocked(held["ledger"]):
        _close(held)
        raise AlreadyKeptError
    del held[SERVER]
    if process.poll() is not None:
        return held, None
    return held, LeftServer(process, launcher.order, ledger_version(held["ledger"]))


def _close(held: dict[str, int]) -> None:
    for descriptor in held.values():
        os.close(descriptor)


def _unlocked(ledger: int) -> bool:
    """Wait for the keeper before to end: its socket may be closed while it still has the lock. Whether it has."""
    probe = os.open(f"/proc/self/fd/{ledger}", os.O_RDWR | os.O_CLOEXEC)
    deadline = time.monotonic() + KEPT_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            time.sleep(0.02)
    finally:
        os.close(probe)
    return False


def _prepare(mountpoint: Path) -> None:
    """Create a mount point, and detach the dead mounts that earlier keepers have left there.

    Raises OSError, and AlreadyKeptError if one is alive.
    """
    if mounting.detach_dead(mountpoint, timeout_s=ANSWER_TIMEOUT_S):
        reporter = Reporter(None, None)
        reporter.warning(f"{mountpoint}: detached the mount of a keeper and a server that have both ended")
    if trimsfs_at(mountpoint) is not None:
        raise AlreadyKeptError
    mountpoint.mkdir(parents=True, exist_ok=True)


def hold(mountpoint: Path) -> int:
    """Hold a mount for servers that come from elsewhere, until a signal, or the next keeper wants it; the exit code."""
    succeed(mountpoint, timeout_s=2 * limits.LEAVE_TIMEOUT_S)
    reporter = Reporter(None, None)
    try:
        launchers = Launchers(mountpoint)
    except ListenError as error:
        reporter.error(f"no server can join the keeper of {mountpoint}: {error}")
        return 1
    reporter.info(f"the keeper of {mountpoint} waits for `trimsfs serve`")
    Notifier(os.environ).tell("READY=1")
    try:
        while True:
            for number in STOP_SIGNALS:
                signal.signal(number, launchers.stop)
            launcher = launchers.wait(GRACE_S if trimsfs_at(mountpoint) is not None else 0)
            try:
                stored, left = _taken_from(launcher)
                keeper = Keeper(launcher.order, launchers, None, stored, left)
            except AlreadyKeptError:
                launcher.end(
                    TakeoverError.__name__,
                    f"{mountpoint} is mounted, and not by this server: end the one that it is of",
                )
                continue
            except OSError as error:
                launcher.end(MountpointError.__name__, f"{error.filename or mountpoint}: {error.strerror}")
                continue
            keeper.watch(launchers.fileno(), launchers.poll)
            if stored:
                reporter.info(f"the keeper, pid {os.getpid()}, takes over the mount that a server has kept")
            code = keeper.run(launchers.stop)
            if launchers.leave or not keeper.ended:
                return code  # if it crashed, the server serves on, for the next keeper
            kind, problem = keeper.failure if code else ("", "")
            launchers.end(kind, problem or ("the mount has ended: see the keeper's log" if code else ""))
    finally:
        launchers.close()
