"""The launcher: joins a keeper elsewhere, as in another container, and starts servers for it.

``trimsfs serve`` becomes it. It has the options and the credentials of the servers, which the keeper has not. It keeps
copies of what the keeper holds, and hands them to the next keeper.
"""

import contextlib
import json
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from mountctl.keeper.control_socket import KeeperGoneError
from mountctl.keeper.fuse_connection import memory_of
from mountctl.keeper.launching.launcher_socket import KEPT, MESSAGE_LIMIT, PROTOCOL, check, peer
from mountctl.keeper.reporter import Reporter
from mountctl.keeper.servers.forked_server import adopt_orphans
from mountctl.keeper.servers.server_process import FORKS, LAUNCHED, told
from mountctl.linux import descriptor_passing
from mountctl.linux.sd_notify import Notifier
from mountctl.linux.sockets import launchers_path
from trimsfs import __version__
from trimsfs.errors import NotMountedError
from trimsfs.exit_codes import exit_code
from trimsfs.polling import readable
from trimsfs.processes import title_of
from trimsfs.text import TITLE_PREFIX, printable

KEEPER_TIMEOUT_S = 60.0
"""How long a new launcher waits for a keeper, and for the first message of one."""
CHECK_INTERVAL_S, CHECK_TIMEOUT_S = 1.0, 2.0
"""How often a launcher sees whether to go on waiting, and how long a keeper may take to answer it then."""
END_TIMEOUT_S = 2.0
"""How long servers that are killed may take to end."""
LEAVE_TIMEOUT_S = 25.0
"""How long one that is stopped while there is no keeper waits for the next: it alone keeps the mount."""
RETRY_S = 0.05


class ServerLauncher:
    """Starts servers by an *order* of a keeper, with all options, whenever the keeper wants one."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._path = launchers_path(Path(order["mountpoint"]))
        self._reporter = Reporter(None, None)
        self._notifier = Notifier(os.environ)
        self._keeper: socket.socket | None = None
        self._heard = False
        """Whether the keeper has sent anything."""
        self._join_by = 0.0
        self._kept: dict[str, int] = {}
        self._stop_by: float | None = None
        self._started: set[int] = set()

    def run(self) -> int:
        """Run until the keeper, or a signal, ends it; the exit code."""
        wakeup, waker = socket.socketpair()
        wakeup.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self._join_by, announced = time.monotonic() + KEEPER_TIMEOUT_S, False
        while True:
            if self._keeper is None:
                self._let_go()
                self._join()
            may_end = self._keeper is None and not self._kept and not self._heard
            if may_end and not announced:
                self._reporter.info(f"waiting up to {KEEPER_TIMEOUT_S:.0f} s for the keeper at {self._path}")
            announced = may_end
            if (problem := self._waits_in_vain()) is not None:
                return self._end(NotMountedError.__name__, problem)
            if self._stops():
                return self._end("", "")
            watched = [wakeup, *([self._keeper] if self._keeper is not None else [])]
            ready = readable(watched, self._pause_s)
            if wakeup in ready and {signal.SIGTERM, signal.SIGINT} & set(wakeup.recv(64)):
                self._stop_by = time.monotonic() + LEAVE_TIMEOUT_S
            self._reap()
            if self._keeper in ready and (code := self._obeyed()) is not None:
                return code

    @property
    def _pause_s(self) -> float | None:
        """How long it may wait for news."""
        if self._keeper is None:
            return RETRY_S
        return None if self._heard and self._stop_by is None else CHECK_INTERVAL_S

    def _waits_in_vain(self) -> str | None:
        """Why there is nothing to wait for; None if there is, or if it keeps a mount. A keeper that answers has more
        time."""
        if self._kept or self._heard or time.monotonic() <= self._join_by:
            return None
        run = f"run `mountctl keeper {self._order['mountpoint']}`"
        if self._keeper is None:
            return f"no keeper listens at {self._path}: {run}"
        if self._keeper_answers():
            self._join_by = time.monotonic() + KEEPER_TIMEOUT_S
            return None
        pid = peer(self._keeper)[0]
        if pid == 0:  # it is in another PID namespace
            return f"the keeper does not answer at {self._path}: {run} again"
        return f"the keeper, pid {pid}, does not answer at {self._path}: run `kill -CONT {pid}`, or {run} again"

    def _stops(self) -> bool:
        """Whether a signal has told it to stop, and a keeper that answers has what it keeps."""
        if self._stop_by is None:
            return False
        if not self._kept or time.monotonic() > self._stop_by:
            return True
        return self._keeper is not None and self._keeper_answers()

    def _keeper_answers(self) -> bool:
        """Whether a keeper answers: one that is stopped, or hangs, is as good as none."""
        try:
            check(Path(self._order["mountpoint"]), timeout_s=CHECK_TIMEOUT_S)
        except KeeperGoneError:
            return False
        return True

    def _let_go(self) -> None:
        """Close what it keeps of a mount that has ended: its cache is another's to use. It waits for a keeper as at its
        start."""
        mount = select.poll()
        if (fuse := self._kept.get("fuse")) is not None:
            mount.register(fuse, 0)
            if mount.poll(0):  # the kernel has ended the connection
                self._keep({})
                self._heard, self._join_by = False, time.monotonic() + KEEPER_TIMEOUT_S

    def _join(self) -> None:
        """Join the keeper, if there is one."""
        end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        options = self._order["options"]
        message = {
            "type": "join",
            "protocol": PROTOCOL,
            "version": __version__,
            "mountpoint": self._order["mountpoint"],
            "source": str(self._order["source"]),
            "allow_other": self._order["allow_other"],
            "cache_dir": options["cache_dir"],
            "log_file": options["log_file"],
            "names": list(self._kept),
        }
        try:
            end.settimeout(CHECK_TIMEOUT_S)
            end.connect(str(self._path))
            descriptor_passing.send(end, json.dumps(message).encode(), self._kept.values())
            end.settimeout(None)
        except OSError:
            end.close()
            return
        self._keeper, self._heard = end, False
        self._join_by = time.monotonic() + KEEPER_TIMEOUT_S

    def _obeyed(self) -> int | None:
        """Do what the keeper wants; the exit code if that is to end."""
        assert self._keeper is not None
        message, descriptors = _received(self._keeper)
        self._heard = True
        match message:
            case {"do": "start"} if len(descriptors) == 1:
                self._start(descriptors[0])
            case {"do": "keep", "names": list(names)} if len(names) == len(descriptors):
                self._keep(dict(zip(names, descriptors, strict=True)))
                self._notifier.tell("READY=1", f"STATUS=serving {self._order['source']}")
                return None
            case {"do": "end", "kind": str(kind), "error": str(error)}:
                return self._end(kind, error)
            case None:
                self._reporter.warning("the keeper has ended: waiting for the next one")
                self._keeper.close()
                self._keeper = None
        for descriptor in descriptors:
            os.close(descriptor)
        return None

    def _start(self, channel: int) -> None:
        """Start a server with its end of the channel to the keeper, which learns from it how that went."""
        os.set_inheritable(channel, True)
        command = [*self._order["server"], "--keeper-fd", str(channel)]
        try:
            order_file = memory_of(json.dumps(self._order | {FORKS: True, LAUNCHED: True}).encode())
            try:
                pid = os.posix_spawn(
                    command[0],
                    command,
                    os.environ,
                    file_actions=[(os.POSIX_SPAWN_DUP2, order_file, 0)],
                    setsid=True,  # signals of a terminal are for this process alone
                    setsigdef=[signal.SIGPIPE, signal.SIGTERM, signal.SIGINT],
                )
            finally:
                os.close(order_file)
            self._started.add(pid)
        except OSError as error:
            self._reporter.error(f"cannot start a server: {error}")

    def _reap(self) -> None:
        """Collect the exit codes of children that have ended, and log those of servers: no keeper gets them."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                server = ended.si_pid in self._started or title_of(ended.si_pid).startswith(f"{TITLE_PREFIX}server")
                _, status = os.waitpid(ended.si_pid, 0)
                self._started.discard(ended.si_pid)
                if server and status:
                    self._reporter.warning(
                        f"server {ended.si_pid} has ended: {told(os.waitstatus_to_exitcode(status))}"
                    )

    def _keep(self, descriptors: dict[str, int]) -> None:
        for descriptor in self._kept.values():
            os.close(descriptor)
        self._kept = descriptors

    def _end(self, kind: str, error: str) -> int:
        """End the servers; the exit code of an error."""
        if self._keeper is not None:
            self._keeper.close()  # first: the keeper then knows that they did not crash
        end_by = time.monotonic() + END_TIMEOUT_S
        try:
            # Again and again: a server leaves its standby. The next server takes over whatever they leave.
            while (children := _children()) and time.monotonic() < end_by:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(RETRY_S)
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
        except PermissionError:
            self._reporter.warning("cannot end its servers, which are another user's: let the container have KILL")
        if not error:
            return 0
        print(f"trimsfs: {printable(error)}", file=sys.stderr, flush=True)
        return exit_code(kind)


def launch(order: dict[str, Any]) -> int:
    """Run as the launcher of an order; the exit code."""
    os.chdir("/")
    adopt_orphans()
    return ServerLauncher(order).run()


def _received(keeper: socket.socket) -> tuple[Any, list[int]]:
    """A message of the keeper and its descriptors; None if the keeper has ended."""
    try:
        data, descriptors, _ = descriptor_passing.receive(keeper, MESSAGE_LIMIT, len(KEPT))
    except OSError:
        return None, []
    return json.loads(data) if data else None, descriptors


def _children() -> list[int]:
    """The servers, and what they left to this process."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
