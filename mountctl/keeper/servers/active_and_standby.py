"""The servers of a mount: the active one, which serves, and the standby, which follows when that one ends."""

import selectors
import time
from typing import Protocol

from mountctl.keeper import limits
from mountctl.keeper.kept_mount import KeptMount
from mountctl.keeper.phase import Phase
from mountctl.keeper.reporter import Reporter
from mountctl.keeper.servers import server_messages
from mountctl.keeper.servers.dispatcher import Dispatcher
from mountctl.keeper.servers.forked_server import forked_by
from mountctl.keeper.servers.replacement import Replacement
from mountctl.keeper.servers.restart_policy import RestartPolicy
from mountctl.keeper.servers.server_messages import Failed
from mountctl.keeper.servers.server_process import ServerProcess
from mountctl.keeper.servers.server_source import Order, ServerSource
from trimsfs.errors import TakeoverError

CANNOT_TAKE_OVER = "this version cannot take over the mount: run `mountctl down` and `mountctl up`"


class OnReady(Protocol):
    """Called when a server is ready; ``resends`` as in `server_messages.Ready`."""

    def __call__(self, server: ServerProcess, *, resends: bool) -> None: ...


class Crew:
    """The servers of one mount, from one source. *left* is one that an earlier keeper has left, and that serves."""

    def __init__(
        self,
        order: Order,
        source: ServerSource,
        mount: KeptMount,
        reporter: Reporter,
        selector: selectors.BaseSelector,
        on_ready: OnReady,
        left: ServerProcess | None,
    ) -> None:
        self.replacement = Replacement(order)
        self.restart_policy = RestartPolicy()
        self.dispatcher = Dispatcher(selector, reporter, self._on_message)
        self._source = source
        self._mount = mount
        self._reporter = reporter
        self._on_ready = on_ready
        self.active = self._left = left
        self.standby: ServerProcess | None = None
        self.ledger_version = mount.connection.ledger_version if left is None else left.ledger_version
        """The version of the last ready server's ledger; None until a server was ready."""
        self.failure = ("", "")
        """The class of the last error of a server, by name, and the error."""
        self._unclaimed: list[int] = []
        """Backing ids that the last server may have died before receiving."""
        self._unmounted_s = 0.0
        """For how long the server has run after the unmount."""

    @property
    def can_start(self) -> bool:
        """Whether there is anything to start a server from."""
        return self._source.can_start(self.replacement.order)

    @property
    def serves(self) -> bool:
        return self.active is not None and self.active.ready_at is not None

    @property
    def urgent(self) -> bool:
        """Whether the next server waits for the end of one, or readers wait for the next server."""
        idle = self.active is None and self.standby is None and not self.can_start
        return not idle and (self.active is None or self.active is self.replacement.outgoing)

    def check(self, passed_s: float) -> None:
        """See whether servers have ended, and kill those that hang. *passed_s* have passed since the last time."""
        self.dispatcher.reap()
        self._mount.notice_unmount()
        if self._mount.phase.unmounted:
            self._unmounted_s += passed_s
        for server, limit_s in ((self.active, limits.SILENCE_LIMIT_S), (self.standby, limits.START_TIMEOUT_S)):
            if server is not None:
                server.silent_s += passed_s
                self._check(server, limit_s)

    def _check(self, server: ServerProcess, silence_limit_s: float) -> None:
        mount, lasts = self._mount, self._unmounted_s > limits.STOP_TIMEOUT_S
        if server.ended():
            self.on_end(server)
        elif mount.phase is Phase.OVERDUE:
            pass  # it has been killed
        elif mount.phase is Phase.UNMOUNTED and server is self.active and lasts:
            mount.phase = Phase.OVERDUE
            self._reporter.warning(
                f"unmounted, but server {server.pid} has not ended in {limits.STOP_TIMEOUT_S:.0f} s: killing it"
            )
            server.kill()
        elif (how := server.hang(silence_limit_s)) is not None:
            role = "standby" if server is self.standby else "server"
            self._reporter.warning(f"{role} {server.pid} {how}: killing it")
            if mount.phase is Phase.UNMOUNTED and server is self.active:
                mount.phase = Phase.OVERDUE
            server.kill()
        elif server.silent_s > limits.HURRY_AFTER_S:
            server.hurry()

    def start_or_promote(self) -> None:
        if self.restart_policy.delay_s:
            return
        if self.active is not None and self.active is self._left and not self.replacement.under_way:
            self.replacement.begin(self.replacement.order, self._mount_followed)
        if self.standby is not None and self.standby.order is not self.replacement.order:
            self.dismiss_standby()  # a replacement has failed
        if self.standby is None:
            serves = self.serves and not self._mount.phase.unmounted
            if self.can_start and (serves or self.active is None):
                self._start()
        elif self.standby.standing_by and self.active is None:
            self.promote(self.standby)

    def _start(self) -> None:
        policy, replacement = self.restart_policy, self.replacement
        try:
            # After a crash the next server often crashes too: a standby must be ready soon.
            spare = self.active is not None and not replacement.under_way and not policy.last_end
            alone = self.active is None and self._mount.connection.mounted
            self.standby = self._source.start(replacement.order, spare=spare, alone=alone)
        except OSError as error:
            self._reporter.error(f"cannot start a server: {error}")
            replacement.fail(f"cannot start a server: {error}")
            if self._mount.phase is Phase.STARTING:
                self._mount.end(1)
            policy.standby_failed("not started", alone=self.active is None and policy.vacant_s > limits.SHORTAGE_S)
            return
        self.dispatcher.add(self.standby)

    def promote(self, server: ServerProcess) -> None:
        """Make the standby the active server; the next standby is forked from it, if it can."""
        self.active, (self.standby, channel) = server, forked_by(server)
        if self.standby is not None:
            self.dispatcher.add(self.standby)
        self.restart_policy.standby_promoted()
        held = self._mount.connection.for_server()
        server.promote(held, self.restart_policy, unclaimed=self._unclaimed, for_forked=channel)

    def dismiss_standby(self) -> None:
        if self.standby is not None:
            self.dispatcher.remove(self.standby)
            self.standby.kill()
            self.standby = None

    def _on_message(self, server: ServerProcess, message: server_messages.Message, descriptors: list[int]) -> None:
        match message:
            case server_messages.StandingBy() if server is self.standby:
                server.standing_by, server.ledger_version, server.forks = True, message.ledger, message.forks
                server.hurry()
                self._on_standing_by(server)
            case Failed():
                self._on_failure(server, message)
            case _ if server is not self.active:
                raise server_messages.ProtocolError(f"{type(message).__name__} from a server that is not active")
            case server_messages.Ready() if self._mount.connection.mounted:
                server.ready_at, self.ledger_version = time.monotonic(), server.ledger_version
                self._on_ready(server, resends=message.resends)
            case server_messages.Alive():
                pass
            case _:
                self._mount.answer(server, message, descriptors)

    def _on_standing_by(self, server: ServerProcess) -> None:
        if self.active is None and self.ledger_version not in {None, server.ledger_version}:
            server.failure = Failed(TakeoverError.__name__, CANNOT_TAKE_OVER)
            server.standing_by = False
            server.kill()
        elif self.active is not None and self.active.order is not server.order and self.replacement.awaits(server):
            if server.ledger_version == self.ledger_version:
                self.replacement.kill_outgoing(self.active)
            else:
                self.replacement.fail(CANNOT_TAKE_OVER)

    def _on_failure(self, server: ServerProcess, failure: Failed) -> None:
        server.failure, self.failure = failure, (failure.kind, failure.error)
        if self.replacement.awaits(server):
            self.replacement.fail(failure.error, failure.kind)
        elif self._mount.phase is Phase.STARTING and self.active in {None, server}:
            self._reporter.outcome({"type": "failed", "kind": failure.kind, "error": failure.error}, failure.error)
        else:
            self._reporter.error(f"server {server.pid} failed: {failure.error}")

    def on_end(self, server: ServerProcess) -> None:
        """Handle the end of a server: another server follows, or the keeper ends too."""
        self.dispatcher.drain(server)
        self.dispatcher.remove(server)
        server.kill()  # threads that are left of it must not serve beside the next
        if server is self.standby:
            self.standby = None
            self._on_standby_end(server)
            return
        self.active = None
        if self.standby is not None:
            self.standby.hurry()
        self._unclaimed = server.unclaimed
        self._mount.notice_unmount()
        phase = self._mount.phase
        if not phase.replaceable:
            self.restart_policy.ended(server.end_reason(), server.ready_at)
            # How one ended that was started elsewhere, the process there knows alone.
            fine = phase is Phase.OVERDUE or (phase.unmounted and self._source.elsewhere)
            self._mount.end(0 if fine else server.exit_code)
            return
        if server is self.replacement.outgoing or self._withdrawn(server):
            self.restart_policy.replaced()
            return
        if server.order is self.replacement.order:
            self.replacement.fail(f"the new server ended ({server.end_reason()}): `mountctl logs` tells why")
        self.restart_policy.ended(server.end_reason(), server.ready_at)
        self._reporter.warning(f"server {server.pid} has ended ({server.end_reason()}): another takes over")

    def _on_standby_end(self, server: ServerProcess) -> None:
        reason = server.end_reason()
        if self._mount.phase is Phase.STARTING and self.active is None:
            self.restart_policy.standby_failed(reason, alone=True)
            self._mount.end(server.exit_code)
        elif self._withdrawn(server):
            self.replacement.fail("its launcher has ended")
        else:
            ended = f"the new server ended ({reason}): `mountctl logs` tells why"
            failure = server.failure or Failed(TakeoverError.__name__, ended)
            if self.active is None and not self.replacement.awaits(server):
                error = self._source.refuse(server, failure.kind, failure.error)
                self._reporter.error(f"server {server.pid} cannot take over: {error}")
            self.replacement.fail(failure.error, failure.kind)
            alone = self.active is None and self._source.can_start(server.order)
            self.restart_policy.standby_failed(reason, alone=alone)

    def _withdrawn(self, server: ServerProcess) -> bool:
        """Whether a server that has ended did so because somebody ended what it came from."""
        if self._source.can_start(server.order):
            return False
        self._reporter.warning(f"server {server.pid} has ended with its launcher: waiting for the next one")
        return True

    def _mount_followed(self, answer: dict[str, object]) -> None:
        """Handle the outcome of replacing the server that was left, which serves on after a failure."""
        if "error" not in answer:
            return
        if self._source.elsewhere:
            self._reporter.warning(f"the server that is left serves on: {answer['error']}")
            return
        self._reporter.outcome({"type": "failed"} | answer | {"kind": TakeoverError.__name__}, str(answer["error"]))
        if self.active is not None and self.replacement.outgoing is None:
            self._mount.left = True
            self._mount.end(1)
