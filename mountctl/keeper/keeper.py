"""The keeper: mounts, holds the connection to the kernel, and sees to it that a server answers there.

A server may die or be replaced at any moment. What must outlive it is here: the /dev/fuse descriptor, the ledger in
which servers write what the kernel has been told (the keeper never looks inside), the lock of the cache directory, and
descriptors of copies in GPU memory. Another server stands by, with everything loaded, and goes on within a moment; what
the kernel has asked meanwhile waits, and what the dead one left unanswered comes again.

The keeper parses nothing but its servers' few messages and its operator's, and never touches the mount: a process that
waits for its own child's answer cannot be cured. Started as ``python -m mountctl.keeper`` with a JSON order on standard
input::

    {"mountpoint": "/models", "source": "s3://bucket", "allow_other": true, "foreground": false, "server": [...]}

``server`` is the command line of the server, which gets the whole order on its own standard input. The first
thing that happens is told as one JSON line on ``--status-fd``: ``{"type": "ready"}`` or ``{"type": "failed",
"kind": ..., "error": ...}``.
"""

import argparse
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mountctl.keeper import protocol
from mountctl.keeper.connection import STORED, Connection
from mountctl.keeper.control_socket import Operator, Reply
from mountctl.keeper.descriptor_store import Kept
from mountctl.keeper.listening import Hearing
from mountctl.keeper.replacement import Orders
from mountctl.keeper.reporting import Reporter
from mountctl.keeper.restart_policy import Lives
from mountctl.keeper.server_process import Server
from mountctl.linux import mounting
from mountctl.linux.mounting import Identity
from mountctl.linux.sd_notify import Notifier, stored_descriptors
from trimsfs.text import set_process_title

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOK_INTERVAL_S = 1.0
DEATH_INTERVAL_S = 0.002
"""How often a server that has been killed is looked at: its successor waits for that."""
STOP_TIMEOUT_S = 10.0
"""How long a server may take to record its state after the file system is unmounted. Half of what who unmounts waits:
a thread of it may be in a call to a driver that never returns."""
SILENCE_LIMIT_S = 30.0
"""A server that has not been heard of for so long does not answer, and is replaced."""
START_TIMEOUT_S = 60.0
"""A server that has not come to stand by in this time never will."""


class Keeper:
    """One mount and its servers: the one that serves, and the one that stands by."""

    def __init__(self, order: dict[str, Any], status: int | None, stored: dict[str, int]) -> None:
        self._orders = Orders(order)
        self._mountpoint = Path(order["mountpoint"])
        self._source = str(order["source"])
        known = order.get("identity")  # to an earlier keeper
        self._connection = Connection(
            self._mountpoint,
            source=self._source,
            allow_other=bool(order["allow_other"]),
            stored=stored,
            identity=Identity(**known) if known is not None else None,
        )
        log_file = None if order["foreground"] else Path(order["options"]["log_file"])
        self._reporter = Reporter(status, log_file)
        self._selector = selectors.DefaultSelector()
        self._operator = Operator(self._selector, self._on_request)
        self._hearing = Hearing(self._selector, self._reporter, self._answer)
        self._notifier = Notifier(os.environ)
        self._kept = Kept(self._mountpoint, self._notifier, stored)
        self._active: Server | None = None
        self._standby: Server | None = None
        self._unclaimed: int | None = None
        self._established = self._connection.mounted
        self._lives = Lives()
        self._exit: int | None = None
        self._gone_at: float | None = None
        self._overdue = False
        self._ledger = ""
        self._listening = self._stored = False

    # The loop

    def run(self) -> int:
        """Serve until the file system is unmounted or no server can be kept alive; the exit code."""
        wakeup, waker = socket.socketpair()
        wakeup.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        for number in (*ENDING, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._selector.register(wakeup, selectors.EVENT_READ, lambda: self._on_signals(wakeup.recv(64)))
        try:
            while self._exit is None:
                self._look()
                if self._exit is None:
                    for key, _ in self._selector.select(self._patience()):
                        act: Callable[[], None] = key.data
                        act()
        except Exception:
            # A defect: the server serves on, and a service manager has another keeper go on with all.
            self._reporter.log(traceback.format_exc())
            self._operator.close()
            return 1
        finally:
            signal.set_wakeup_fd(-1)
        self._clean_up()
        return self._exit

    def _patience(self) -> float:
        """How long nothing is to be looked at."""
        if self._active is None or self._active is self._orders.outgoing:
            return max(DEATH_INTERVAL_S, min(LOOK_INTERVAL_S, self._lives.delay_s))
        return LOOK_INTERVAL_S

    def _look(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        self._operator.look()
        self._hearing.look()
        if self._gone_at is None and self._connection.mounted and self._connection.gone:
            self._gone_at = now
        for server, limit_s in ((self._active, SILENCE_LIMIT_S), (self._standby, START_TIMEOUT_S)):
            if server is None:
                continue
            if server.ended():
                self._on_end(server)
            elif server is self._active and self._gone_at is not None and now - self._gone_at > STOP_TIMEOUT_S:
                self._end_overdue(server)
            elif now - server.heard > limit_s and not server.standing_by and not server.speaks():
                self._reporter.log(f"the server (pid {server.pid}) does not answer: killing it")
                server.kill()
        if self._active is not None and self._exit is None:
            self._notifier.alive()
        self._reporter.shorten_log()
        if self._exit is not None or self._lives.delay_s:
            return
        if self._standby is not None and self._standby.order is not self._orders.now:
            self._dismiss_standby()  # a replacement has failed
        if self._standby is None:
            if self._active is None or self._active.ready_at is not None:
                self._start()
        elif self._standby.standing_by and self._active is None:
            self._promote(self._standby)

    def _end_overdue(self, server: Server) -> None:
        """End a server that goes on though there is nothing left to serve: who unmounts waits for it."""
        if not self._overdue:
            self._overdue = True
            self._reporter.log(f"unmounted, but the server (pid {server.pid}) does not end: killing it")
            server.kill()

    def _on_signals(self, numbers: bytes) -> None:
        if set(ENDING) & set(numbers):
            self._reporter.log("unmounting")
            self._notifier.tell("STOPPING=1")
            self._unmount()
            self._exit = 0

    # Servers

    def _start(self) -> None:
        """Start a server that stands by."""
        try:
            server = Server(self._orders.now)
        except OSError as error:
            self._reporter.log(f"no server can be started: {error}")
            self._orders.revoke(f"no server can be started: {error}")
            if not self._established:
                self._exit = 1
            self._lives.standby_failed("not started", alone=self._active is None)
            self._give_up_if_hopeless()
            return
        self._hearing.begin(server)
        self._standby = server

    def _promote(self, server: Server) -> None:
        """Let the server that stands by serve."""
        self._active, self._standby = server, None
        self._lives.standby_came()
        server.standing_by = False
        server.heard = time.monotonic()
        held = self._connection.held()
        turn = {"descriptors": list(held), "unclaimed": self._unclaimed, "restarts": self._lives.restarts}
        server.send(turn, list(held.values()))

    def _answer(self, server: Server, message: protocol.Message, descriptors: list[int]) -> None:
        connection = self._connection
        match message:
            case protocol.StandingBy() if server is self._standby:
                server.standing_by, server.ledger = True, message.ledger
                self._on_standing_by(server)
            case protocol.Failed():
                self._on_failure(server, message)
            case _ if server is not self._active:
                raise protocol.ProtocolError("it is not its turn")
            case protocol.Mount() if not connection.mounted and descriptors:
                answer = connection.mount(descriptors.pop())
                server.send(answer, [connection.held()["fuse"]] if connection.mounted else [])
            case protocol.BackingOpen() if connection.mounted:
                answer = connection.open_backing(descriptors)
                server.unclaimed = answer.get("id")
                server.send(answer)
            case protocol.BackingClose() if connection.mounted:
                connection.close_backing(message.number)
            case protocol.Hold() | protocol.LetGo() | protocol.Recall() | protocol.Listen():
                self._kept.answer(message, descriptors, server.send)
            case protocol.Ready() if connection.mounted:
                self._on_ready(server, resends=message.resends)
            case protocol.Alive():
                pass
            case _:
                raise protocol.ProtocolError(f"{type(message).__name__} out of order")

    def _on_standing_by(self, server: Server) -> None:
        if self._active is not None and self._orders.awaits(server):
            if server.ledger == self._ledger:
                self._orders.oust(self._active)
            else:
                self._orders.revoke("this version cannot go on with the mount: take it down, and up again")

    def _on_ready(self, server: Server, *, resends: bool) -> None:
        server.ready_at = time.monotonic()
        self._notifier.tell("READY=1", f"STATUS=serving {self._source}", f"MAINPID={os.getpid()}")
        if self._established:
            self._reporter.log(f"the server with pid {server.pid} goes on")
        else:
            self._established = resends
            identity = self._connection.identity
            for problem in ["it is not mounted any more"] if identity is None else mounting.tune(identity.device):
                self._reporter.log(f"not tuned: {problem}")
        self._ledger = server.ledger
        if not self._listening:
            self._listening = True
            deaf = self._operator.listen(self._mountpoint)
            if deaf is not None:
                self._reporter.log(f"mountctl cannot ask this mount: {deaf}")
        self._reporter.tell({"type": "ready"}, f"{self._source} is mounted at {self._mountpoint}")
        replaced = self._orders.fulfilled(server)
        if self._established and (replaced or not self._stored):
            self._store()

    def _store(self) -> None:
        """Have the service manager keep what another keeper would need."""
        identity = self._connection.identity
        known = {"identity": asdict(identity)} if identity is not None else {}
        stored = self._connection.stored(json.dumps(self._orders.now | known).encode())
        if self._stored:
            self._notifier.unstore(("order",))
            stored = {"order": stored["order"]}
        self._notifier.store(stored)
        self._kept.store()
        self._stored = True

    def _on_failure(self, server: Server, message: protocol.Failed) -> None:
        if self._orders.replacing:
            self._orders.revoke(message.error)
        elif self._established:
            self._reporter.log(f"the server with pid {server.pid} fails: {message.error}")
        else:
            self._reporter.tell({"type": "failed", "kind": message.kind, "error": message.error}, message.error)

    def _on_end(self, server: Server) -> None:
        """A server has ended: for good, or to be replaced."""
        self._hearing.hear_last(server)
        self._hearing.part(server)
        if server is self._standby:
            self._on_standby_end(server)
            return
        self._active = None
        self._unclaimed = server.unclaimed
        if not self._established or self._connection.gone:
            self._lives.ended(server.fate(), server.ready_at)
            # For a service manager, an unmount that had to be helped has not failed: it would mount anew.
            self._exit = 0 if self._overdue else server.status
            return
        if server is self._orders.outgoing:
            self._lives.replaced()
            return
        if server.order is self._orders.now:
            self._orders.revoke(f"the new server ended ({server.fate()}): see the log")
        self._lives.ended(server.fate(), server.ready_at)
        self._reporter.log(f"the server (pid {server.pid}) has ended ({server.fate()}): another goes on")
        self._give_up_if_hopeless()

    def _on_standby_end(self, server: Server) -> None:
        self._standby = None
        self._orders.revoke(f"the new server ended ({server.fate()}): see the log")
        self._lives.standby_failed(server.fate(), alone=self._active is None)
        if self._active is None and not self._established:
            self._exit = server.status
        self._give_up_if_hopeless()

    def _give_up_if_hopeless(self) -> None:
        if self._lives.hopeless and self._exit is None:
            self._reporter.log(f"servers end at once, again and again ({self._lives.last_end}): giving up")
            self._notifier.tell("STATUS=servers end at once: given up")
            self._exit = 1

    def _dismiss_standby(self) -> None:
        if self._standby is not None:
            self._hearing.part(self._standby)
            self._standby.kill()
            self._standby = None

    # The operator

    def _on_request(self, request: dict[str, Any], reply: Reply) -> None:
        match request:
            case {"do": "status"}:
                reply(self._facts())
            case {"do": "replace"} if not self._established:
                reply({"error": "this kernel cannot go on with a mount, Linux 6.9 can: take it down, and up again"})
            case {"do": "replace", **given}:
                if self._orders.replace(given.get("order", self._orders.now), reply):
                    self._dismiss_standby()  # it has loaded what is outdated
                    self._lives.hurry()
            case _:
                reply({"error": "no such request"})

    def _facts(self) -> dict[str, Any]:
        active = self._active
        serving = active is not None and active.ready_at is not None
        return {
            "state": "serving" if serving else "starting",
            "mountpoint": str(self._mountpoint),
            "source": self._source,
            "keeper_pid": os.getpid(),
            "server_pid": active.pid if active is not None else None,
            "standby": self._standby is not None and self._standby.standing_by,
            "restarts": self._lives.restarts,
            "last_end": self._lives.last_end,
            "last_end_at": self._lives.last_end_at,
            "log_file": self._orders.now["options"]["log_file"],
            "foreground": self._orders.now["foreground"],
        }

    # The end

    def _unmount(self) -> None:
        problem = self._connection.unmount()
        if problem is not None:
            self._reporter.log(f"{self._mountpoint}: {problem}: detached")
            if self._active is not None:
                self._active.terminate()

    def _clean_up(self) -> None:
        """Leave neither servers nor mount behind."""
        self._operator.close()
        self._notifier.unstore(STORED)
        self._kept.close()
        self._dismiss_standby()
        server = self._active
        if server is not None:
            server.channel.close()  # nobody is to wait for an answer from here
            if not self._connection.mounted:
                server.terminate()  # it does not end by itself
            if not server.wait(STOP_TIMEOUT_S):
                # One of its threads may wait in the kernel for an answer that it should itself have given.
                self._connection.abort()
                server.kill()
                server.wait(STOP_TIMEOUT_S)
        self._connection.close()
        error = f"the server ended ({self._lives.last_end or 'killed'}) before the mount answered"
        self._reporter.tell({"type": "failed", "kind": "Exception", "error": error}, error)


def _leave_no_core() -> None:
    """Have the kernel write no core of this process and its servers, which have credentials in memory.

    A limit of 0 is none for programs that take cores from a pipe; for them, 1 is one.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    most = 1 if hard == resource.RLIM_INFINITY else min(hard, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))


def main() -> None:
    """Entry point of the keeper process."""
    parser = argparse.ArgumentParser(prog="mountctl.keeper")
    parser.add_argument("--status-fd", type=int)
    status: int | None = parser.parse_args().status_fd
    if status is not None:
        os.set_inheritable(status, False)
    _leave_no_core()
    order = json.load(sys.stdin)
    set_process_title("keeper", Path(order["mountpoint"]))
    sys.exit(Keeper(order, status, stored_descriptors(os.environ)).run())
