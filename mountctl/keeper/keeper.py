"""The keeper: mounts, holds the FUSE connection, and makes sure that a server serves the mount.

A server may die or be replaced at any moment. The keeper holds what must outlive it: the descriptor of /dev/fuse, the
ledger, the lock of the cache directory, and descriptors of GPU copies. In the ledger, servers record what the kernel
knows; the keeper never looks inside. A second server stands by with everything loaded, and takes over at once. The
kernel queues requests meanwhile, and resends those that the dead server left unanswered.

The keeper parses only the few messages of its servers and operators. It never touches the mount: a process that waits
for its own child cannot help it. ``__main__`` starts it with a JSON order::

    {"mountpoint": "/models", "source": "s3://bucket", "allow_other": true, "foreground": false, "server": [...]}

``server`` is the command line of the server, which gets the whole order on its own standard input. The keeper reports
the outcome as one JSON line on ``--status-fd``: ``{"type": "ready"}`` or ``{"type": "failed", "kind": ...,
"error": ...}``. The successor of a killed keeper replaces the server that is left or, if that fails, lets it serve on.
"""

import math
import os
import selectors
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mountctl.keeper import limits
from mountctl.keeper.control_socket import ControlSocket, Reply
from mountctl.keeper.kept_mount import KeptMount
from mountctl.keeper.phase import Phase
from mountctl.keeper.reporter import Reporter
from mountctl.keeper.servers.active_and_standby import Crew
from mountctl.keeper.servers.server_process import ServerProcess
from mountctl.keeper.servers.server_source import Order, ServerSource
from mountctl.linux import mounting

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OPTION_PREFIX = "TRIMSFS_"
"""What the names of variables with options begin with: `trimsfs.options` has it as well, and takes memory."""


def handled_in_loop(_number: int, _frame: object) -> None:
    """Handle a signal: the keeper's loop gets its number, too."""


class Keeper:
    """Keeps one mount, and has its servers come from a source; *left* is a server that an earlier keeper has left.

    *status* is that of `Reporter`; *stored* are the descriptors of an earlier keeper, by name.
    """

    def __init__(
        self,
        order: Order,
        servers: ServerSource,
        status: int | None,
        stored: dict[str, int],
        left: ServerProcess | None = None,
    ) -> None:
        self._source = str(order["source"])
        self._servers = servers
        self._mount = KeptMount(order, stored)
        self._reporter = Reporter(status, None if order["foreground"] else Path(order["options"]["log_file"]))
        self._selector = selectors.DefaultSelector()
        """The keeper calls the data of a descriptor's key when the descriptor can be read."""
        self._control_socket = ControlSocket(self._selector, self._on_request)
        self._crew = Crew(
            order, servers, self._mount, self._reporter, self._selector, on_ready=self._on_ready, left=left
        )
        self._listens_at = math.inf
        """When to try again to listen for operators."""
        self._leave_by: float | None = None
        """When a keeper that is to leave its mount unmounts it, if no launcher keeps it for the next one."""
        self._ticked_at = time.monotonic()
        self._vacant_s = 0.0
        """For how long there has been no server."""
        self._problem: str | None = None
        """Why no server starts for now."""

    @property
    def ended(self) -> bool:
        """Whether `run` has come to an end, rather than met a defect."""
        return self._mount.ended

    @property
    def failure(self) -> tuple[str, str]:
        """The class of the last error of a server, by name, and the error."""
        return self._crew.failure

    def watch(self, descriptor: int, act: Callable[[], None]) -> None:
        """Call *act* in the loop when a descriptor can be read."""
        self._selector.register(descriptor, selectors.EVENT_READ, act)

    # The loop

    def run(self, on_stop: Callable[[int, object], None] = handled_in_loop) -> int:
        """Run until the file system is unmounted or no server can be kept alive; the exit code.

        *on_stop* is called for a signal to stop, at any time, also once the loop has ended.
        """
        if self._mount.connection.mounted:
            self._listen()
        try:
            self._loop(on_stop)
        except Exception:
            # A defect. The server still serves, and a service manager starts another keeper for the mount.
            self._reporter.error(f"keeper crashed: report the traceback\n{traceback.format_exc()}")
            self._control_socket.close()
            return 1
        self._clean_up()
        return self._mount.exit_code

    def _loop(self, on_stop: Callable[[int, object], None]) -> None:
        wakeup, waker = socket.socketpair()
        wakeup.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        signal.signal(signal.SIGCHLD, handled_in_loop)
        for number in STOP_SIGNALS:
            signal.signal(number, on_stop)
        self.watch(wakeup.fileno(), lambda: self._on_signals(wakeup.recv(64)))
        try:
            while not self.ended:
                self._tick()
                if self.ended:
                    break
                for key, _ in self._selector.select(self._due_s):
                    act: Callable[[], None] = key.data
                    act()
        finally:
            signal.set_wakeup_fd(-1)

    @property
    def _due_s(self) -> float:
        """How long the next tick can wait."""
        if self._crew.urgent:
            return max(limits.DEATH_TICK_S, min(limits.TICK_S, self._crew.restart_policy.delay_s))
        return limits.TICK_S

    def _tick(self) -> None:
        """Check the servers, and start and promote those that are due."""
        self._control_socket.drop_idle()
        now = time.monotonic()
        # While this process was stopped as well, e.g. with its container, just one tick passes.
        passed_s, self._ticked_at = min(now - self._ticked_at, limits.TICK_S), now
        self._crew.check(passed_s)
        self._give_up_if_exhausted()
        if self._crew.active is not None and not self.ended:
            self._mount.service_manager.alive()
        if self._listens_at <= now and not self.ended:
            self._listen()
        self._reporter.rotate_log()
        if not self.ended:
            self._crew.start_or_promote()
            self._give_up_if_exhausted()
        if not self.ended:
            self._look_at_source()
        self._vacant_s = self._vacant_s + passed_s if self._crew.active is None else 0.0
        if self._mount.phase.replaceable and self._vacant_s > limits.VACANCY_LIMIT_S:
            self._reporter.error(f"no server has come for {limits.VACANCY_LIMIT_S:.0f} s: giving up")
            self._mount.end(1)
        elif self._leave_by is not None and not self.ended:
            self._leave(self._leave_by)

    def _give_up_if_exhausted(self) -> None:
        if self._crew.restart_policy.exhausted and not self.ended:
            self._reporter.error(f"servers keep crashing ({self._crew.restart_policy.last_end}): giving up")
            self._mount.service_manager.tell("STATUS=servers keep crashing: gave up")
            self._mount.end(1)

    def _look_at_source(self) -> None:
        """See what launchers elsewhere want, and whether they can still start servers."""
        crew, phase = self._crew, self._mount.phase
        if self._servers.leave and self._leave_by is None:
            self._stop()
        if phase is not Phase.STARTING and not self.ended:
            for order, reply in self._servers.newcomers():
                crew.replacement.fail("another server has come")
                if self._replace(order, reply):
                    crew.failure = ("", "")
                    crew.restart_policy.reset()
        before, self._problem = self._problem, self._servers.problem(crew.replacement.order)
        if self._problem is not None and before is None:
            self._reporter.warning(f"the launcher, {self._problem}")
        if crew.active is None and not crew.can_start:
            if phase.unmounted:
                self._mount.end(0)  # nobody else would end it, and it would refuse the next launcher
            elif (earlier := self._servers.another()) is not None:
                crew.replacement.fail("its launcher has ended")
                crew.replacement.order = earlier

    def _on_signals(self, numbers: bytes) -> None:
        if set(STOP_SIGNALS) & set(numbers):
            self._stop()

    def _stop(self) -> None:
        """Unmount and end; where servers are elsewhere, leave the mount to the next keeper instead."""
        if self._servers.elsewhere and self._mount.phase.replaceable:
            self._leave_by = time.monotonic() + limits.LEAVE_TIMEOUT_S
            return
        self._reporter.info("the keeper got a signal to stop: unmounting")
        self._mount.service_manager.tell("STOPPING=1")
        self._unmount()

    def _leave(self, leave_by: float) -> None:
        """Leave the mount to the next keeper, as soon as a launcher keeps what it needs; in the end, unmount."""
        active = self._crew.active
        if active is not None and self._crew.serves and self._servers.can_start(active.order):
            self._reporter.info("the keeper got a signal to stop: it leaves the mount to the next one")
            self._mount.left = True
            self._mount.end(0)
        elif time.monotonic() > leave_by:
            self._reporter.warning("the keeper got a signal to stop, and no server keeps the mount: unmounting")
            self._unmount()

    def _unmount(self) -> None:
        if (problem := self._mount.connection.unmount()) is not None:
            self._reporter.warning(f"{self._mount.mountpoint}: {problem}: detached")
            if self._crew.active is not None:
                self._crew.active.terminate()
        self._mount.end(0)

    def _on_ready(self, server: ServerProcess, *, resends: bool) -> None:
        mount, replacement = self._mount, self._crew.replacement
        mount.service_manager.tell("READY=1", f"STATUS=serving {self._source}", f"MAINPID={os.getpid()}")
        if mount.phase.replaceable:
            self._reporter.info(f"server {server.pid} has taken over the mount")
        elif mount.phase is Phase.STARTING:
            mount.phase = Phase.REPLACEABLE if resends else Phase.IRREPLACEABLE
            identity = mount.connection.identity
            for problem in ["it is no longer mounted"] if identity is None else mounting.tune(identity.device):
                self._reporter.warning(f"cannot raise the read-ahead: {problem}")
            self._listen()
        self._reporter.outcome({"type": "ready"}, f"{self._source} is mounted at {mount.mountpoint}")
        replaced = replacement.complete(server)
        if mount.phase.replaceable:
            mount.store(replacement.order, changed=replaced)
        self._servers.keep(server, mount.for_next_keeper() if mount.phase.replaceable else {})

    # Operators

    def _listen(self) -> None:
        first, self._listens_at = math.isinf(self._listens_at), math.inf
        if (error := self._control_socket.listen(self._mount.mountpoint)) is not None:
            self._listens_at = time.monotonic() + limits.LISTEN_INTERVAL_S
            if first:
                self._reporter.error(f"mountctl cannot reach this keeper: {error}")

    def _on_request(self, request: dict[str, Any], reply: Reply) -> None:
        crew = self._crew
        match request:
            case {"do": "status"}:
                reply(self._status())
            case {"do": "replace", **given} if self._servers.elsewhere and ("order" in given or not crew.can_start):
                remedy = "restart that, its container or its unit trimsfs-server@NAME"
                reply({"error": f"its servers come with their options from `trimsfs serve`: {remedy}"})
            case {"do": "replace", **given}:
                if self._replace(given.get("order", crew.replacement.order), reply):
                    crew.restart_policy.reset_delay()
            case _:
                reply({"error": "unknown request"})

    def _replace(self, order: Order, reply: Reply) -> bool:
        """Begin to replace the server by one with this order; False, after a reply that says why, if refused."""
        if (refusal := self._mount.phase.refusal) is not None:
            reply({"error": refusal})
            return False
        if not self._crew.replacement.begin(order, reply):
            return False
        self._crew.dismiss_standby()  # it has loaded the earlier version or options
        return True

    def _status(self) -> dict[str, Any]:
        crew = self._crew
        problem = {} if self._problem is None else {"error": f"the launcher, {self._problem}"}
        return {
            "state": "serving" if crew.serves else "starting",
            "mountpoint": str(self._mount.mountpoint),
            "source": self._source,
            "keeper_pid": os.getpid(),
            "server_pid": crew.active.pid if crew.active is not None else None,
            "standby": crew.standby is not None and crew.standby.standing_by,
            **crew.restart_policy.facts(),
            "log_file": crew.replacement.order["options"]["log_file"],
            "foreground": crew.replacement.order["foreground"],
            "environment": {name: value for name, value in os.environ.items() if name.startswith(OPTION_PREFIX)},
            **problem,
        }

    # The end

    def _clean_up(self) -> None:
        """End the servers and unmount, unless a server serves on."""
        self._control_socket.close()
        self._crew.dismiss_standby()
        if self._mount.left:
            return
        if self._mount.exit_code != 0:
            self._mount.connection.abort()  # others have copies of its descriptor
        if self._crew.ledger_version is not None:  # before a server was ready, this would be the news that theirs is
            self._servers.keep(None, {})
        self._mount.close(self._crew.active)
        error = f"the server ended ({self._crew.restart_policy.last_end or 'killed'}) before the mount answered"
        self._reporter.outcome({"type": "failed", "kind": "Exception", "error": error}, error)
        self._mount.remove_devices(self._reporter)
