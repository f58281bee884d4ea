"""The standalone keeper: its servers come from elsewhere, as from another container, and its mount outlives it.

`trimsfs serve` joins it, starts its servers and keeps copies of its descriptors. A server, its container and the keeper
may each end at any time: whoever is left has what the next one needs.
"""

import contextlib
import fcntl
import os
import selectors
import signal
import time
from pathlib import Path
from typing import Any

from mountctl.keeper.control_socket import Reply
from mountctl.keeper.fuse_connection import AlreadyKeptError
from mountctl.keeper.keeper import CANNOT_TAKE_OVER, STOP_SIGNALS, Keeper
from mountctl.keeper.launching.launchers import SERVER, Launcher, Launchers, succeed
from mountctl.keeper.limits import TICK_S
from mountctl.keeper.phase import Phase
from mountctl.keeper.reporter import Reporter
from mountctl.keeper.servers import server_messages
from mountctl.keeper.servers.forked_server import ForkedServer, OtherProcess
from mountctl.keeper.servers.server_process import ServerProcess
from mountctl.keeper.succession.predecessor import LeftServer, fits, ledger_version
from mountctl.linux import mounting
from mountctl.linux.sd_notify import Notifier
from mountctl.linux.sockets import ListenError
from trimsfs.errors import MountpointError, TakeoverError
from trimsfs.mountinfo import trimsfs_at

LEAVE_TIMEOUT_S = 25.0
"""How long a keeper that is stopped waits for a launcher to keep the mount, before it unmounts."""
VACANCY_LIMIT_S = 600.0
"""Readers that have waited for a server for so long get an error: the longest pause of the kubelet between restarts is
half of it."""
GRACE_S = 1.0
"""How long a new keeper of a mount that is there waits for the launcher that has kept it."""
ANSWER_TIMEOUT_S = 2.0
"""How long a mount that was left may take to show whether it is dead."""
KEPT_TIMEOUT_S = 5.0
"""How long the keeper before may take to end."""


class StandaloneKeeper(Keeper):
    """Keeps one mount, from the first launcher until it is unmounted, or this process leaves it to the next keeper."""

    def __init__(self, launchers: Launchers, launcher: Launcher) -> None:
        stored, left = _taken_from(launcher)
        super().__init__(launcher.order, None, stored, left)
        self._launchers = launchers
        self._selector.register(launchers, selectors.EVENT_READ, launchers.poll)
        self._leave_by: float | None = None
        self._vacant_s = 0.0
        self._launcher_problem: str | None = None
        self.failure = ("", "")
        """The class of the last error of a server, by name, and the error."""
        if stored:
            self._ledger_version = ledger_version(stored["ledger"])
            self._reporter.info(f"the keeper, pid {os.getpid()}, takes over the mount that a server has kept")

    @property
    def ended(self) -> bool:
        """Whether `run` has come to an end, rather than met a defect."""
        return self._ending

    # The loop

    def _tick(self) -> None:
        super()._tick()
        if self._ending:
            return
        if self._launchers.leave and self._leave_by is None:
            self._on_signals(bytes([signal.SIGTERM]))
        while self._phase is not Phase.STARTING and (launcher := self._launchers.take()) is not None:
            self._on_join(launcher)
        self._look_at_launcher()
        if self._active is None and not self._can_start:
            if self._phase.unmounted:
                self._end(0)  # nobody else would end it, and it would refuse the next launcher
                return
            self._fall_back()
        idle = not self._replacement.under_way and not self._restart_policy.delay_s
        if isinstance(self._active, LeftServer) and idle:
            self._replacement.begin(self._replacement.order, self._on_followed)
        self._vacant_s = self._vacant_s + self._passed_s if self._active is None else 0.0
        if self._phase.replaceable and self._vacant_s > VACANCY_LIMIT_S:
            self._reporter.error(f"no server has come for {VACANCY_LIMIT_S:.0f} s: giving up")
            self._end(1)
        elif self._leave_by is not None:
            self._leave(self._leave_by)

    def _end(self, exit_code: int) -> None:
        # Only its launcher gets the exit code of a server.
        super()._end(0 if self._phase.unmounted else exit_code)

    def _tick_s(self) -> float:
        idle = self._active is None and self._standby is None and not self._can_start
        return TICK_S if idle else super()._tick_s()

    def _on_signal(self, number: int, _frame: object) -> None:
        if number in STOP_SIGNALS:
            self._launchers.stop()  # the loop may have ended

    def _on_signals(self, numbers: bytes) -> None:
        if set(STOP_SIGNALS) & set(numbers):
            self._leave_by = time.monotonic() + LEAVE_TIMEOUT_S
            if not self._phase.replaceable:
                super()._on_signals(numbers)

    def _leave(self, leave_by: float) -> None:
        """Leave the mount to the next keeper, as soon as a launcher keeps what it needs; in the end, unmount."""
        active = self._active
        if active is not None and active.ready_at is not None and self._launchers.of(active.order) is not None:
            self._reporter.info("the keeper got a signal to stop: it leaves the mount to the next one")
            self._leaves = True
            self._end(0)
        elif time.monotonic() > leave_by:
            self._reporter.warning("the keeper got a signal to stop, and no server keeps the mount: unmounting")
            self._unmount()
            self._end(0)

    def _clean_up(self) -> None:
        if not self._leaves:
            if self._exit_code != 0:
                self._connection.abort()  # launchers have copies of its descriptor
            # Before a server was ready they have none, and would take this for the news that theirs is.
            for launcher in self._launchers.living() if self._ledger_version is not None else ():
                launcher.keep({})
        super()._clean_up()

    # Launchers and their servers

    def _look_at_launcher(self) -> None:
        launcher, problem = self._launchers.of(self._replacement.order), self._launcher_problem
        self._launcher_problem = None
        if launcher is not None and launcher.stays_stopped:
            self._launcher_problem = (
                f"pid {launcher.pid}, is stopped: no other server starts: run `kill -CONT {launcher.pid}`"
            )
            if problem is None:
                self._reporter.warning(f"the launcher, {self._launcher_problem}")

    def _status(self) -> dict[str, Any]:
        told = {"error": f"the launcher, {self._launcher_problem}"} if self._launcher_problem is not None else {}
        return super()._status() | told

    def _on_join(self, launcher: Launcher) -> None:
        """Replace the server by one of a launcher that has just joined."""
        launcher.drop_held()
        if self._phase.refusal is not None:
            launcher.end(TakeoverError.__name__, _for_launcher(self._phase.refusal))
            return
        self._replacement.fail("another server has come")
        self.failure = ("", "")

        def answer(outcome: dict[str, Any]) -> None:
            if "error" in outcome:
                kind = self.failure[0] or str(outcome.get("kind", TakeoverError.__name__))
                launcher.end(kind, _for_launcher(outcome["error"]))

        if self._replacement.begin(launcher.order, answer):
            self._dismiss_standby()
            self._restart_policy.reset()

    def _fall_back(self) -> None:
        """Have an earlier launcher start servers if the latest is gone."""
        earlier = self._launchers.living()
        if earlier:
            self._replacement.fail("its launcher has ended")
            self._replacement.order = earlier[0].order

    @property
    def _can_start(self) -> bool:
        return self._launchers.of(self._replacement.order) is not None

    def _new_server(self, *, spare: bool) -> ServerProcess:
        launcher = self._launchers.of(self._replacement.order)
        if launcher is None:
            raise OSError("its launcher has ended")
        return launcher.start(self._replacement.order)

    def _withdrawn(self, server: ServerProcess) -> bool:
        if self._launchers.of(server.order) is not None:
            return False
        self._reporter.warning(f"server {server.pid} has ended with its launcher: waiting for the next one")
        return True

    def _on_standing_by(self, server: ServerProcess) -> None:
        if self._active is None and self._ledger_version not in {None, server.ledger_version}:
            self._refuse(server, CANNOT_TAKE_OVER)
        else:
            super()._on_standing_by(server)

    def _on_ready(self, server: ServerProcess, *, resends: bool) -> None:
        super()._on_ready(server, resends=resends)
        current = self._launchers.of(server.order)
        for launcher in self._launchers.living():
            if launcher is not current:
                launcher.keep({})  # what it kept of its server is out of date
        if current is None:
            return
        if not self._phase.replaceable:
            current.keep({})  # it learns that its server is ready
            return
        pidfd = {SERVER: server.pidfd} if isinstance(server, ForkedServer) else {}
        current.keep(self._connection.for_server() | self._descriptor_store.listener() | pidfd)

    def _on_failure(self, server: ServerProcess, message: server_messages.Failed) -> None:
        self.failure = (message.kind, message.error)
        super()._on_failure(server, message)

    def _on_standby_end(self, server: ServerProcess) -> None:
        self._standby = None
        if self._phase is Phase.STARTING:
            self._end(server.exit_code)
            return
        if self._withdrawn(server):
            self._replacement.fail("its launcher has ended")
            return
        reason = f"the new server ended ({server.end_reason()}): see its log"
        self._restart_policy.standby_failed(server.end_reason(), alone=False)
        if self._active is None and not self._replacement.awaits(server):
            self._refuse(server, self.failure[1] or reason)
        else:
            self._replacement.fail(self.failure[1] or reason)

    def _refuse(self, server: ServerProcess, error: str) -> None:
        """End the launcher of a server that cannot serve: whoever restarts it tries again. The mount waits."""
        error = _for_launcher(error)
        self._reporter.error(f"server {server.pid} cannot take over: {error}")
        launcher = self._launchers.of(server.order)
        self._replacement.fail(error)
        if launcher is not None:
            launcher.end(self.failure[0] or TakeoverError.__name__, error)
        self._dismiss_standby()

    def _on_followed(self, answer: dict[str, Any]) -> None:
        if "error" in answer:
            self._reporter.warning(f"the server that is left serves on: {answer['error']}")

    def _on_request(self, request: dict[str, Any], reply: Reply) -> None:
        if request.get("do") == "replace" and ("order" in request or not self._can_start):
            remedy = "restart that, its container or its unit trimsfs-server@NAME"
            reply({"error": f"its servers come with their options from `trimsfs serve`: {remedy}"})
        else:
            super()._on_request(request, reply)


def _for_launcher(error: str) -> str:
    """An error for the operator of a launcher: its mount comes up by another command than that of other keepers."""
    return error.replace("`mountctl up`", "start `trimsfs serve` again")


def _taken_from(launcher: Launcher) -> tuple[dict[str, int], LeftServer | None]:
    """What a launcher has kept of a mount that is still there, by name, and the server that is left, if one is."""
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
    succeed(mountpoint, timeout_s=2 * LEAVE_TIMEOUT_S)
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
                keeper = StandaloneKeeper(launchers, launcher)
            except AlreadyKeptError:
                launcher.end(
                    TakeoverError.__name__,
                    f"{mountpoint} is mounted, and not by this server: end the one that it is of",
                )
                continue
            except OSError as error:
                launcher.end(MountpointError.__name__, f"{error.filename or mountpoint}: {error.strerror}")
                continue
            code = keeper.run()
            if launchers.leave or not keeper.ended:
                return code  # if it crashed, the server serves on, for the next keeper
            kind, problem = keeper.failure if code else ("", "")
            for each in launchers.living():
                each.end(kind, problem or ("the mount has ended: see the keeper's log" if code else ""))
    finally:
        launchers.close()
