"""The keeper: mounts, holds the FUSE connection, and makes sure that a server serves the mount.

A server may die or be replaced at any moment. The keeper holds what must outlive it: the descriptor of /dev/fuse, the
ledger in which servers record what the kernel knows (the keeper never looks inside), the lock of the cache directory,
and descriptors of copies in GPU memory. A second server stands by with everything loaded, and takes over at once. The
kernel queues requests meanwhile, and resends those that the dead server left unanswered.

The keeper parses only the few messages of its servers and operators, and never touches the mount: a process that waits
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
from mountctl.keeper.descriptor_store import DescriptorStore
from mountctl.keeper.fuse_connection import Connection
from mountctl.keeper.phase import Phase
from mountctl.keeper.reporter import Reporter
from mountctl.keeper.servers import server_messages
from mountctl.keeper.servers.dispatcher import Dispatcher
from mountctl.keeper.servers.forked_server import forked_by
from mountctl.keeper.servers.replacement import Replacement
from mountctl.keeper.servers.restart_policy import RestartPolicy
from mountctl.keeper.servers.server_process import ServerProcess
from mountctl.keeper.service_manager import ServiceManager
from mountctl.linux import mounting
from mountctl.linux.sd_notify import Notifier

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OPTION_PREFIX = "TRIMSFS_"
"""What the names of variables with options begin with: `trimsfs.options` has it as well, and takes memory."""
CANNOT_TAKE_OVER = "this version cannot take over the mount: run `mountctl down` and `mountctl up`"


class Keeper:
    """One mount and its servers: the active one, which serves, and the standby."""

    def __init__(
        self, order: dict[str, Any], status: int | None, stored: dict[str, int], left: ServerProcess | None = None
    ) -> None:
        self._replacement = Replacement(order)
        self._mountpoint, self._source = Path(order["mountpoint"]), str(order["source"])
        self._connection = Connection.of(order, stored)
        log_file = None if order["foreground"] else Path(order["options"]["log_file"])
        self._reporter = Reporter(status, log_file)
        self._selector = selectors.DefaultSelector()
        self._control_socket = ControlSocket(self._selector, self._on_request)
        self._dispatcher = Dispatcher(self._selector, self._reporter, self._on_message)
        notifier = Notifier(os.environ)
        self._service_manager = ServiceManager(notifier, self._source)
        self._descriptor_store = DescriptorStore(self._mountpoint, notifier, stored)
        self._restart_policy = RestartPolicy()
        self._phase = Phase.REPLACEABLE if self._connection.mounted else Phase.STARTING
        self._active: ServerProcess | None = left
        self._standby: ServerProcess | None = None
        self._unclaimed: list[int] = []
        """Backing ids that the last server may have died before receiving."""
        self._ledger_version: str | None = None
        """The version of the last ready server's ledger; None until a server was ready."""
        self._leaves = False
        """Whether this keeper ends without an unmount, and lets the predecessor's server serve on."""
        self._listens_at = math.inf
        """When to try again to listen for operators."""
        self._ticked_at, self._passed_s = time.monotonic(), 0.0
        """When the last tick was, and for how long this process ran before it."""
        self._unmounted_s = 0.0
        """For how long the server has run after the unmount."""
        self._exit_code = 0
        if left is not None:
            self._ledger_version = left.ledger_version
            self._replacement.begin(order, self._on_followed)

    # The loop

    def run(self) -> int:
        """Run until the file system is unmounted or no server can be kept alive; the exit code."""
        wakeup, waker = socket.socketpair()
        wakeup.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, self._on_signal)
        self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._on_signals(wakeup.recv(64)))
        if self._connection.mounted:
            self._listen()
        try:
            while not self._ending:
                self._tick()
                if not self._ending:
                    for key, _ in self._selector.select(self._tick_s()):
                        act: Callable[[], None] = key.data
                        act()
        except Exception:
            # A defect. The server still serves, and a service manager starts another keeper for the mount.
            self._reporter.error(f"keeper crashed: report the traceback\n{traceback.format_exc()}")
            self._control_socket.close()
            return 1
        finally:
            signal.set_wakeup_fd(-1)
        self._clean_up()
        return self._exit_code

    @property
    def _ending(self) -> bool:
        return self._phase is Phase.ENDING

    def _end(self, exit_code: int) -> None:
        """Leave the loop; the first exit code counts."""
        if not self._ending:
            self._phase, self._exit_code = Phase.ENDING, exit_code

    def _tick_s(self) -> float:
        """How long the next tick can wait."""
        if self._active is None or self._active is self._replacement.outgoing:
            return max(limits.DEATH_TICK_S, min(limits.TICK_S, self._restart_policy.delay_s))
        return limits.TICK_S

    def _tick(self) -> None:
        """Check the servers, and start and promote those that are due."""
        self._control_socket.drop_idle()
        self._dispatcher.reap()
        self._notice_unmount()
        now = time.monotonic()
        # While this process was stopped as well, e.g. with its container, just one tick passes.
        self._passed_s, self._ticked_at = min(now - self._ticked_at, limits.TICK_S), now
        if self._phase.unmounted:
            self._unmounted_s += self._passed_s
        for server, limit_s in ((self._active, limits.SILENCE_LIMIT_S), (self._standby, limits.START_TIMEOUT_S)):
            if server is not None:
                server.silent_s += self._passed_s
                self._check(server, limit_s)
        if self._active is not None and not self._ending:
            self._service_manager.alive()
        if self._listens_at <= now and not self._ending:
            self._listen()
        self._reporter.rotate_log()
        if self._ending or self._restart_policy.delay_s:
            return
        if self._standby is not None and self._standby.order is not self._replacement.order:
            self._dismiss_standby()  # a replacement has failed
        if self._standby is None:
            serves = self._active is not None and self._active.ready_at is not None and not self._phase.unmounted
            if self._can_start and (serves or self._active is None):
                self._start()
        elif self._standby.standing_by and self._active is None:
            self._promote(self._standby)

    def _notice_unmount(self) -> None:
        if not (self._phase.unmounted or self._ending) and self._connection.mounted and self._connection.gone:
            self._phase = Phase.UNMOUNTED

    def _check(self, server: ServerProcess, silence_limit_s: float) -> None:
        """See whether a server has ended, and kill one that hangs."""
        if server.ended():
            self._on_end(server)
        elif self._phase is Phase.OVERDUE:
            pass  # it has been killed
        elif self._phase is Phase.UNMOUNTED and server is self._active and self._unmounted_s > limits.STOP_TIMEOUT_S:
            self._phase = Phase.OVERDUE
            self._reporter.warning(
                f"unmounted, but server {server.pid} has not ended in {limits.STOP_TIMEOUT_S:.0f} s: killing it"
            )
            server.kill()
        elif server.stays_stopped:
            role = "standby" if server is self._standby else "server"
            self._reporter.warning(f"{role} {server.pid} is stopped: killing it")
            if self._phase is Phase.UNMOUNTED and server is self._active:
                self._phase = Phase.OVERDUE
            server.kill()
        elif server.silent_s > silence_limit_s and not server.standing_by and not server.has_message():
            self._reporter.warning(f"server {server.pid} has sent nothing for {silence_limit_s:.0f} s: killing it")
            server.kill()
        elif server.silent_s > limits.HURRY_AFTER_S:
            server.hurry()

    def _on_signal(self, _number: int, _frame: object) -> None:
        """Handle a signal; the loop gets its number, too."""

    def _on_signals(self, numbers: bytes) -> None:
        if set(STOP_SIGNALS) & set(numbers):
            self._reporter.info("the keeper got a signal to stop: unmounting")
            self._service_manager.stopping()
            self._unmount()
            self._end(0)

    # Servers

    def _start(self) -> None:
        """Start a standby."""
        try:
            # After a crash the next server often crashes too: a standby must be ready soon.
            spare = self._active is not None and not self._replacement.under_way and not self._restart_policy.last_end
            server = self._new_server(spare=spare)
        except OSError as error:
            self._reporter.error(f"cannot start a server: {error}")
            self._replacement.fail(f"cannot start a server: {error}")
            if self._phase is Phase.STARTING:
                self._end(1)
            lasts = self._restart_policy.vacant_s > limits.SHORTAGE_S
            self._restart_policy.standby_failed("not started", alone=self._active is None and lasts)
            self._give_up_if_exhausted()
            return
        self._dispatcher.add(server)
        self._standby = server

    @property
    def _can_start(self) -> bool:
        """Whether there is anything to start a server from."""
        return True

    def _new_server(self, *, spare: bool) -> ServerProcess:
        """Start a server process. Raises OSError."""
        alone = self._active is None and self._connection.mounted
        return ServerProcess(self._replacement.order, spare=spare, alone=alone)

    def _withdrawn(self, _server: ServerProcess) -> bool:
        """Whether a server that has ended did so because somebody ended what it came from."""
        return False

    def _promote(self, server: ServerProcess) -> None:
        """Make the standby the active server; the next standby is forked from it, if it can."""
        self._active, (self._standby, channel) = server, forked_by(server)
        if self._standby is not None:
            self._dispatcher.add(self._standby)
        self._restart_policy.standby_promoted()
        held = self._connection.for_server()
        server.promote(held, self._restart_policy, unclaimed=self._unclaimed, for_forked=channel)

    def _on_message(self, server: ServerProcess, message: server_messages.Message, descriptors: list[int]) -> None:
        connection = self._connection
        match message:
            case server_messages.StandingBy() if server is self._standby:
                server.standing_by, server.ledger_version, server.forks = True, message.ledger, message.forks
                server.hurry()
                self._on_standing_by(server)
            case server_messages.Failed():
                self._on_failure(server, message)
            case _ if server is not self._active:
                raise server_messages.ProtocolError(f"{type(message).__name__} from a server that is not active")
            case server_messages.Mount() if not connection.mounted and descriptors:
                answer = connection.mount(descriptors.pop())
                server.send(answer, [connection.for_server()["fuse"]] if connection.mounted else [])
            case server_messages.BackingOpen() if connection.mounted:
                answers = connection.open_backings(descriptors, message.count or 1)
                server.unclaimed = [answer["id"] for answer in answers if "id" in answer]
                server.send({"answers": answers} if message.count else answers[0])
            case server_messages.BackingClose() if connection.mounted:
                connection.close_backing(message.number)
            case server_messages.Hold() | server_messages.LetGo() | server_messages.Recall() | server_messages.Listen():
                self._descriptor_store.answer(message, descriptors, server.send)
            case server_messages.Ready() if connection.mounted:
                self._on_ready(server, resends=message.resends)
            case server_messages.Alive():
                pass
            case _:
                raise server_messages.ProtocolError(f"{type(message).__name__} out of order")

    def _on_standing_by(self, server: ServerProcess) -> None:
        if self._active is not None and self._active.order is not server.order and self._replacement.awaits(server):
            if server.ledger_version == self._ledger_version:
                self._replacement.kill_outgoing(self._active)
            else:
                self._replacement.fail(CANNOT_TAKE_OVER)

    def _on_ready(self, server: ServerProcess, *, resends: bool) -> None:
        server.ready_at = time.monotonic()
        self._service_manager.ready()
        if self._phase.replaceable:
            self._reporter.info(f"server {server.pid} has taken over the mount")
        elif self._phase is Phase.STARTING:
            self._phase = Phase.REPLACEABLE if resends else Phase.IRREPLACEABLE
            identity = self._connection.identity
            for problem in ["it is no longer mounted"] if identity is None else mounting.tune(identity.device):
                self._reporter.warning(f"cannot raise the read-ahead: {problem}")
            self._listen()
        self._ledger_version = server.ledger_version
        self._reporter.outcome({"type": "ready"}, f"{self._source} is mounted at {self._mountpoint}")
        replaced = self._replacement.complete(server)
        if self._phase.replaceable and (replaced or not self._service_manager.stored):
            self._service_manager.store(self._connection, self._replacement.order)
            self._descriptor_store.store()

    def _on_followed(self, answer: dict[str, Any]) -> None:
        """Handle the outcome of replacing the predecessor's server, which serves on after a failure."""
        if "error" in answer:
            self._reporter.outcome({"type": "failed"} | answer | {"kind": "TakeoverError"}, answer["error"])
            if self._active is not None and self._replacement.outgoing is None:
                self._leaves = True
                self._end(1)

    def _on_failure(self, server: ServerProcess, message: server_messages.Failed) -> None:
        if self._replacement.awaits(server):
            self._replacement.fail(message.error, message.kind)
        elif self._phase is Phase.STARTING:
            self._reporter.outcome({"type": "failed", "kind": message.kind, "error": message.error}, message.error)
        else:
            self._reporter.error(f"server {server.pid} failed: {message.error}")

    def _on_end(self, server: ServerProcess) -> None:
        """Handle the end of a server: another server follows, or the keeper ends too."""
        self._dispatcher.drain(server)
        self._dispatcher.remove(server)
        server.kill()  # threads that are left of it must not serve beside the next
        if server is self._standby:
            self._on_standby_end(server)
            return
        self._active = None
        if self._standby is not None:
            self._standby.hurry()
        self._unclaimed = server.unclaimed
        self._notice_unmount()
        if not self._phase.replaceable:
            self._restart_policy.ended(server.end_reason(), server.ready_at)
            self._end(0 if self._phase is Phase.OVERDUE else server.exit_code)
            return
        if server is self._replacement.outgoing or self._withdrawn(server):
            self._restart_policy.replaced()
            return
        if server.order is self._replacement.order:
            self._replacement.fail(f"the new server ended ({server.end_reason()}): see the log")
        self._restart_policy.ended(server.end_reason(), server.ready_at)
        self._reporter.warning(f"server {server.pid} has ended ({server.end_reason()}): another takes over")
        self._give_up_if_exhausted()

    def _on_standby_end(self, server: ServerProcess) -> None:
        self._standby = None
        self._replacement.fail(f"the new server ended ({server.end_reason()}): see the log")
        self._restart_policy.standby_failed(server.end_reason(), alone=self._active is None)
        if self._phase is Phase.STARTING:
            self._end(server.exit_code)
        self._give_up_if_exhausted()

    def _give_up_if_exhausted(self) -> None:
        if self._restart_policy.exhausted and not self._ending:
            self._reporter.error(f"servers keep crashing ({self._restart_policy.last_end}): giving up")
            self._service_manager.gave_up()
            self._end(1)

    def _dismiss_standby(self) -> None:
        if self._standby is not None:
            self._dispatcher.remove(self._standby)
            self._standby.kill()
            self._standby = None

    # Operators

    def _listen(self) -> None:
        first, self._listens_at = math.isinf(self._listens_at), math.inf
        if (error := self._control_socket.listen(self._mountpoint)) is not None:
            self._listens_at = time.monotonic() + limits.LISTEN_INTERVAL_S
            if first:
                self._reporter.error(f"mountctl cannot reach this keeper: {error}")

    def _on_request(self, request: dict[str, Any], reply: Reply) -> None:
        match request:
            case {"do": "status"}:
                reply(self._status())
            case {"do": "replace"} if self._phase.refusal is not None:
                reply({"error": self._phase.refusal})
            case {"do": "replace", **given}:
                if self._replacement.begin(given.get("order", self._replacement.order), reply):
                    self._dismiss_standby()  # it has loaded the version or options of before
                    self._restart_policy.reset_delay()
            case _:
                reply({"error": "unknown request"})

    def _status(self) -> dict[str, Any]:
        active = self._active
        return {
            "state": "serving" if active is not None and active.ready_at is not None else "starting",
            "mountpoint": str(self._mountpoint),
            "source": self._source,
            "keeper_pid": os.getpid(),
            "server_pid": active.pid if active is not None else None,
            "standby": self._standby is not None and self._standby.standing_by,
            **self._restart_policy.facts(),
            "log_file": self._replacement.order["options"]["log_file"],
            "foreground": self._replacement.order["foreground"],
            "environment": {name: value for name, value in os.environ.items() if name.startswith(OPTION_PREFIX)},
        }

    # The end

    def _unmount(self) -> None:
        if (problem := self._connection.unmount()) is not None:
            self._reporter.warning(f"{self._mountpoint}: {problem}: detached")
            if self._active is not None:
                self._active.terminate()

    def _clean_up(self) -> None:
        """End the servers and unmount, unless the predecessor's server serves on."""
        self._control_socket.close()
        if self._leaves:
            self._dismiss_standby()
            return
        self._service_manager.unstore()
        self._descriptor_store.close()
        self._dismiss_standby()
        server = self._active
        if server is not None:
            server.channel.close()  # the keeper answers it no more
            if not self._connection.mounted:
                server.terminate()  # it does not end by itself
            if not server.wait(limits.STOP_TIMEOUT_S):
                # One of its threads may wait in the kernel for an answer of the server itself.
                self._connection.abort()
                server.kill()
                server.wait(limits.STOP_TIMEOUT_S)
        self._connection.close()
        error = f"the server ended ({self._restart_policy.last_end or 'killed'}) before the mount answered"
        self._reporter.outcome({"type": "failed", "kind": "Exception", "error": error}, error)
        self._remove_devices()

    def _remove_devices(self) -> None:
        """Remove the CDI spec of the mount, which has ended."""
        try:
            from mountctl.linux.cdi_specs import remove  # noqa: PLC0415 - only now: it takes memory

            remove(self._mountpoint)
        except Exception as error:  # the programs may have been replaced or removed since this one began
            self._reporter.warning(f"the CDI devices of {self._mountpoint} are not removed: {error}")
