"""A server process and the keeper's end of the channel to it."""

import contextlib
import json
import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any, Protocol

from mountctl.keeper.fuse_connection import memory_of
from mountctl.keeper.servers import server_messages
from mountctl.keeper.servers.restart_policy import RestartPolicy
from mountctl.linux import descriptor_passing
from trimsfs.processes import StopWatch

STRAY_TIMEOUT_S = 0.5
ENVIRONMENT = "environment"
"""The field of an order that has the keeper's environment variables, for its successor."""
FORKS = "forks"
"""The field of an order that lets a server fork the next one."""
LAUNCHED = "launched"
"""The field of an order of a server whose keeper is elsewhere."""
ALONE = "alone"
"""The field of an order of a server for a mount that has none: it does without what it can do without."""


class Process(Protocol):
    """What a keeper needs of `subprocess.Popen`."""

    @property
    def pid(self) -> int: ...

    returncode: int | Any

    def poll(self) -> int | None: ...

    def kill(self) -> None: ...

    def terminate(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int: ...


class ServerProcess:
    """A server process and the channel to it. It stands by until it is promoted.

    A *spare* one, which nobody waits for, loads in idle time until `hurry`. One that starts *alone* is for a mount that
    has no server. Raises OSError if it cannot be started.
    """

    def __init__(self, order: dict[str, Any], *, spare: bool = False, alone: bool = False) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._begin(order, ours)
        # The server keeps the order open: a successor of this keeper reads it there.
        more = {ENVIRONMENT: dict(os.environ), FORKS: True, ALONE: alone}
        order_file = memory_of(json.dumps(order | more).encode())
        try:
            self._process: Process = subprocess.Popen(
                [*order["server"], "--keeper-fd", str(theirs.fileno())],
                stdin=order_file,
                pass_fds=[theirs.fileno()],
                cwd="/",
                # Signals of a terminal are for the keeper alone, and some kernels share cores by session.
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(order_file)
            theirs.close()
        self._in_idle_time = spare and os.geteuid() == 0  # only root may undo it
        if self._in_idle_time:
            self._schedule(os.SCHED_IDLE, niceness=19)

    def _begin(self, order: dict[str, Any], channel: socket.socket) -> None:
        self.order = order
        self.channel = channel
        self.standing_by = self.forks = False
        self.ledger_version = ""
        self.silent_s = 0.0
        """For how long it has sent nothing, while the keeper ran."""
        self._stop_watch = StopWatch()
        self.ready_at: float | None = None
        self.failure: server_messages.Failed | None = None
        """Why it ends, if it has said so."""
        self.unclaimed: list[int] = []
        """Backing ids that the server has not confirmed: it may die before it receives them."""

    def hurry(self) -> None:
        """Let it load at normal priority, if it still loads in idle time."""
        if self._in_idle_time:
            self._in_idle_time = False
            self._schedule(os.SCHED_OTHER, niceness=0)

    def _schedule(self, policy: int, *, niceness: int) -> None:
        process = Path(f"/proc/{self.pid}")
        with contextlib.suppress(OSError):
            for thread in (process / "task").iterdir():
                os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))
            (process / "autogroup").write_text(str(niceness))

    @property
    def pid(self) -> int:
        return self._process.pid

    def promote(
        self,
        held: dict[str, int],
        before: RestartPolicy,
        *,
        unclaimed: list[int],
        for_forked: socket.socket | None = None,
    ) -> None:
        """Promote the standby: it gets the descriptors of the mount, by name, and serves.

        *unclaimed* are backing ids that the previous server may have died before receiving, *before* tells how many
        servers there were. *for_forked* is an end of a channel, for the server that it forks; this closes it.
        """
        self.standing_by = False
        self.silent_s = 0.0
        held = held if for_forked is None else held | {"standby": for_forked.fileno()}
        promotion = {
            "descriptors": list(held),
            "unclaimed": unclaimed[-1] if unclaimed else None,  # for servers of earlier versions
            "all_unclaimed": unclaimed,
            "backing_limit": server_messages.BACKING_LIMIT,
            "restarts": before.restarts,
            "vacant_since": before.vacant_since,
            "keeper_pid": os.getpid(),
            "server_pid": self.pid,
        }
        self.send(promotion, list(held.values()))
        if for_forked is not None:
            for_forked.close()

    def has_message(self) -> bool:
        """Whether it has sent a message that `receive` has not returned yet; the end of the channel is none."""
        with contextlib.suppress(OSError):
            return bool(self.channel.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        return False

    def receive(self) -> tuple[server_messages.Message | None, list[int]]:
        """The next message, None at the end of the channel, and the descriptors with it. Raises ProtocolError."""
        try:
            data, descriptors, pidfd = descriptor_passing.receive(
                self.channel, server_messages.MESSAGE_LIMIT, server_messages.DESCRIPTOR_LIMIT
            )
        except OSError:
            return None, []
        if pidfd is not None:
            self._sent_by(pidfd)
        if not data:
            return None, []
        self.silent_s = 0.0
        self.unclaimed = []
        try:
            message = server_messages.parse(data)
            if len(descriptors) > server_messages.most_descriptors(message):
                raise server_messages.ProtocolError("too many descriptors")
        except server_messages.ProtocolError:
            for descriptor in descriptors:
                os.close(descriptor)
            raise
        return message, descriptors

    def _sent_by(self, pidfd: int) -> None:
        """Take the pidfd of a message's sender, which comes only while the process is unknown."""
        os.close(pidfd)

    def send(self, message: dict[str, Any], descriptors: list[int] | None = None) -> None:
        """Send a message without waiting. A server that does not receive hangs, which the keeper notices soon."""
        with contextlib.suppress(OSError):
            data = json.dumps(message).encode()
            descriptor_passing.send(self.channel, data, descriptors or (), flags=socket.MSG_DONTWAIT)

    def hang(self, silence_limit_s: float) -> str | None:
        """How it hangs: it has been stopped for a while, or silent for longer than this; None if neither.

        Ask once a tick.
        """
        if self._stop_watch.stays_stopped(self.pid):
            return "is stopped"
        if self.silent_s > silence_limit_s and not self.standing_by and not self.has_message():
            return f"has sent nothing for {silence_limit_s:.0f} s"
        return None

    def ended(self) -> bool:
        """Whether the server has ended; threads that hang in the kernel may be left of it."""
        if self._process.poll() is not None:
            return True
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:  # this process has no room to look
            return False
        return state in {"Z", "X"}

    def reaped(self) -> bool:
        """Whether all its threads have ended, and its exit code is collected."""
        return self._process.poll() is not None

    def kill(self) -> None:
        """End it at once: the next server takes over whatever state it leaves."""
        with contextlib.suppress(OSError):
            self._process.kill()

    def terminate(self) -> None:
        with contextlib.suppress(OSError):
            self._process.terminate()

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end; False after the timeout."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def exit_code(self) -> int:
        """Its exit code, as a shell shows it."""
        self.wait(STRAY_TIMEOUT_S)  # `ended` sees the end before the last thread has ended
        code = self._process.returncode
        if code is None:  # a thread of it hangs in the kernel
            return 128 + signal.SIGKILL
        return code if code >= 0 else 128 - code

    def end_reason(self) -> str:
        """How it ended, for messages."""
        code = self._process.poll()
        return "killed" if code is None else told(code)


def told(code: int) -> str:
    """An exit code, as `subprocess` has it, for messages."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"
