"""The loop of a fork server: takes callers' orders, forks, and passes signals and exit statuses on.

It waits for nothing but the next event. A fork tells it when it is ready; the caller then says "go", or is gone.
"""

import fcntl
import gc
import os
import select
import signal
import socket
import sys
import time

from trimsfs.extras.spawn.fork_server.child import be_traceable, become, end_with_parent, take_signals
from trimsfs.extras.spawn.fork_server.joining import Joining, Peer, RefusedError, differing
from trimsfs.extras.spawn.fork_server.log import log
from trimsfs.extras.spawn.fork_server.preloading import Preloading
from trimsfs.extras.spawn.fork_server.programs import (
    Caller,
    Fork,
    Message,
    Program,
    check_numbers,
    raised_socket,
    refusal,
    refuse,
    signal_process,
    tell,
)
from trimsfs.extras.spawn.fork_server.successors import Successors
from trimsfs.extras.spawn.fork_server.thread_count import ThreadCount, end_idle_pools
from trimsfs.extras.spawn.messages import PROTOCOL, Receiver, peer, raised, send


class Server:
    """Forks programs until it has been idle for *idle_s* seconds, or is told to end.

    *first* is the lowest number of its own descriptors, so that callers' have theirs in a fork. *successors* take its
    place when there is more to import, or when a file has changed that a module came from.
    """

    def __init__(
        self,
        listener: socket.socket,
        preloading: Preloading,
        threads: ThreadCount,
        *,
        first: int,
        idle_s: float | None,
        successors: Successors,
        joining: Joining | None,
    ) -> None:
        self._listener: socket.socket | None = listener
        self._preloading = preloading
        self._threads = threads
        self._first = first
        self._idle_s = idle_s
        self._notes = successors.notes
        self._successors = successors
        self._joining = joining
        self._known = set(sys.modules) if successors.learns else None
        self._changes = preloading.environment_changes()
        self._callers: dict[int, Caller] = {}
        self._forks: dict[int, Fork] = {}
        self._pid = os.getpid()
        self._served = 0
        self._used_at = time.monotonic()
        self._poll = select.poll()
        self._woken, self._wakes = (raised(end, first) for end in os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))

    def serve(self) -> Program | None:
        """Serve callers. Returns in a fork, with what it is to run; else at the server's end, with None."""
        signal.signal(signal.SIGCHLD, lambda *_: None)  # it wakes the loop
        signal.set_wakeup_fd(self._wakes, warn_on_full_buffer=False)
        assert self._listener is not None
        self._listener.setblocking(False)
        for number in (self._listener.fileno(), self._woken):
            self._poll.register(number, select.POLLIN)
        self._reap()  # what ended before this process was started over
        gc.collect()
        gc.freeze()  # else the collector would write to each object, and each fork would copy all pages
        while self._listener is not None or self._callers:
            for number, _ in self._poll.poll(self._patience_ms()):
                if (program := self._event(number)) is not None:
                    return program
            if self._listener is not None and self._patience_ms() == 0:
                self.stop()
        return None

    def stop(self) -> None:
        """Take no more callers."""
        if self._listener is not None:
            self._poll.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _patience_ms(self) -> int | None:
        if self._callers or self._successors.ready >= 0 or self._idle_s is None:
            return None
        return int(1000 * max(0.0, self._used_at + self._idle_s - time.monotonic()))

    def _event(self, number: int) -> Program | None:
        if self._listener is not None and number == self._listener.fileno():
            self._accept()
        elif number == self._woken:
            os.read(self._woken, 4096)
            self._reap()
        elif number == self._successors.ready:
            self._poll.unregister(number)
            if self._successors.took_over():
                self.stop()
        elif number in self._callers:
            return self._hear(self._callers[number])
        elif number in self._forks:
            self._hear_fork(self._forks[number])
        return None

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        with connection:
            _, user, _ = peer(connection)
            if user != os.geteuid() and self._joining is None:
                log(f"uid {user} is refused")
                return
            try:
                number = fcntl.fcntl(connection, fcntl.F_DUPFD_CLOEXEC, self._first)
            except OSError as error:
                tell(connection, refusal(error))
                return
        caller = Caller(socket.socket(fileno=number), self._first)
        caller.connection.setblocking(False)  # who does not read what it is told must not hold others up
        # A caller's descriptors must not wait in a server that does not run.
        caller.tell({"is": "here", "protocol": PROTOCOL})
        self._callers[number] = caller
        self._poll.register(number, select.POLLIN)

    def _hear(self, caller: Caller) -> Program | None:
        try:
            caller.receiver.read(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except (EOFError, OSError) as error:
            if isinstance(error, OSError):
                caller.tell(refusal(error))
            self._forget(caller)
            return None
        program = None
        while program is None and caller.connection.fileno() in self._callers and not caller.is_read_by_fork:
            try:
                if (whole := caller.receiver.message()) is None:
                    return None
                program = self._answer(caller, whole[0])
            except Exception as error:  # whatever one caller sends, the programs of others must go on
                if os.getpid() != self._pid:
                    os._exit(1)
                if isinstance(error, OSError):
                    caller.tell(refusal(error))
                else:
                    log(f"a message that is none: {error!r}")
                    self._forget(caller)
        return program

    def _answer(self, caller: Caller, message: Message) -> Program | None:
        match message["do"]:
            case "run" if caller.fork is None:
                return self._fork_for(caller)
            case "go" if caller.fork is not None and caller.fork.may_run:
                caller.fork.may_run, caller.fork.has_begun = False, True
                tell(caller.fork.channel, {"do": "go"})
            case "signal" if caller.fork is not None and caller.passes_on(message["number"]):
                signal_process(caller.fork.pid, message["number"], group=message["group"])
            case "tell":
                caller.tell(self._status())
            case "stop" if self._joining is None or self._joining.owns(caller.connection):
                if self._successors.ready >= 0:
                    self._poll.unregister(self._successors.ready)
                    self._successors.cancel()
                self.stop()
                caller.tell({"is": "stopping"})
        return None

    def _renew(self, caller: Caller, path: str) -> None:
        """Have another server take this one's place, as a file has changed."""
        if self._joining is None:
            self._start_successor()
            self.stop()
            caller.tell({"is": "again"})
        elif self._listener is None or any(each.fork for each in self._callers.values()):
            caller.tell({"is": "refused", "why": f"{path} has changed since the fork server began, and programs run"})
        else:
            caller.tell({"is": "again"})
            self._successors.start_over(self._listener.fileno(), -1)  # who started it knows this process

    def _start_successor(self) -> None:
        """Start the server that is to take this one's place; this one goes on until then."""
        if self._listener is not None and self._successors.start(self._listener):
            self._poll.register(self._successors.ready, select.POLLIN)

    def _status(self) -> Message:
        return {
            "is": "serving",
            "served": self._served,
            "running": sum(each.fork is not None for each in self._callers.values()),
            "idle_s": round(time.monotonic() - self._used_at),
            "modules": len(sys.modules),
            "title": self._successors.settings["title"],
            "left_out": self._successors.told,
        }

    def _fork_for(self, caller: Caller) -> Program | None:
        """Fork a process that reads a caller's order itself: this one never has what belongs to one program."""
        self._used_at = time.monotonic()
        if (path := self._preloading.stale()) is not None:
            self._renew(caller, path)
            return None
        ours, theirs = (raised_socket(end, self._first) for end in socket.socketpair())
        end_idle_pools()
        try:
            joined = None if self._joining is None else self._joining.peer(caller.connection)
        except RefusedError as refused:
            ours.close()
            theirs.close()
            caller.tell({"is": "refused", "why": str(refused)})
            return None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
        except OSError as error:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            ours.close()
            theirs.close()
            if joined is not None:
                joined.close()
            caller.tell(refusal(error))
            return None
        if pid == 0:
            ours.close()
            return self._in_fork(theirs, caller, joined)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self._served += 1
        caller.fork = fork = Fork(pid, ours, caller, joined)
        self._forks[ours.fileno()] = fork
        self._poll.register(ours, select.POLLIN)
        self._poll.unregister(caller.connection)  # until the fork is ready, or has ended
        caller.is_read_by_fork = True
        caller.tell({"is": "forked"})
        return None

    def _in_fork(self, channel: socket.socket, own: Caller, joined: Peer | None) -> Program:
        self._threads.end()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for caller in self._callers.values():
            if caller is not own:
                caller.receiver.close()
        for fork in self._forks.values():
            fork.close()
        if self._listener is not None:
            self._listener.close()
        os.close(self._woken)
        os.close(self._wakes)
        self._successors.close()
        try:
            order, descriptors = own.order()
            own.connection.close()
            check_numbers(order["descriptors"], descriptors)
            if self._threads.at_fork > 1:
                raise RefusedError(f"the fork server has threads: {', '.join(self._threads.names)}")
            if joined is not None:
                self._join(joined, order, channel)
            become(
                order,
                descriptors,
                first=self._first,
                changes=self._changes,
                keep=channel.fileno(),
                joins=joined is not None,
            )
        except EOFError:
            os._exit(1)  # the caller has ended
        except RefusedError as refused:
            refuse(channel, str(refused))
        except Exception as error:  # whatever it is, the caller can still run the program itself
            refuse(channel, f"a fork cannot become what its caller is: {error}")
        try:
            send(channel, {"is": "ready"})
            Receiver(channel).wait()
            be_traceable(may=True)
            end_with_parent(channel)
        except (EOFError, OSError):
            os._exit(1)  # the caller, or the server, has ended
        take_signals(order)
        return Program(order, channel, self._known)

    def _join(self, joined: Peer, order: Message, channel: socket.socket) -> None:
        """In a fork: become what its caller is. Returns in the process that is in the caller's PID namespace."""
        assert self._joining is not None
        self._joining.check(order)
        be_traceable(may=os.geteuid() != 0)
        joined.join(order)
        if (path := differing(self._preloading.files)) is not None:
            raise RefusedError(f"{path} is another file than the one that the fork server has")
        if joined.enters_pid_namespace:
            reads, writes = os.pipe()
            if (pid := os.fork()) != 0:
                send(channel, {"is": "another process", "pid": pid})
                os._exit(0)
            os.close(writes)
            os.read(reads, 1)  # until that is sent: two processes have the channel
            os.close(reads)
        joined.close()

    def _hear_fork(self, fork: Fork) -> None:
        try:
            fork.receiver.read(socket.MSG_DONTWAIT)
            self._follow(fork)
        except BlockingIOError:
            return
        except Exception as error:  # a program can write what it wants
            if not isinstance(error, EOFError | OSError):
                log(f"a message of a program that is none: {error!r}")
            self._close(fork)

    def _follow(self, fork: Fork) -> None:
        while (whole := fork.receiver.message()) is not None:
            message, _ = whole
            if fork.has_begun:
                if self._known is not None and self._successors.learn(message["modules"]):
                    self._start_successor()
                continue
            if message["is"] == "another process":
                fork.is_now(message["pid"])
                continue
            self._listen_to(fork.caller)
            if message["is"] == "refused" or (why := fork.joined()) is None:
                fork.may_run = message["is"] == "ready"
                fork.caller.tell(message | {"notes": self._notes})
            else:
                signal_process(fork.pid, signal.SIGKILL, group=False)
                fork.caller.tell({"is": "refused", "why": why})

    def _close(self, fork: Fork) -> None:
        self._poll.unregister(fork.channel)
        del self._forks[fork.channel.fileno()]
        fork.close()

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            self._successors.forget(pid, status)
            caller = next((each for each in self._callers.values() if each.fork and each.fork.pid == pid), None)
            if caller is None or (fork := caller.fork) is None:
                continue
            if not fork.has_begun and fork.channel.fileno() in self._forks:
                self._hear_fork(fork)  # another process may be the fork now
                if fork.pid != pid:
                    continue
            if os.WIFSTOPPED(status):
                caller.stop()
                continue
            caller.go_on()
            if os.WIFCONTINUED(status):
                continue
            caller.fork = None
            if fork.channel.fileno() in self._forks:
                self._hear_fork(fork)  # the last that it said; what it started may have the channel, too, for long
            if fork.channel.fileno() in self._forks:
                self._close(fork)
            self._used_at = time.monotonic()
            self._listen_to(caller)
            caller.tell({"is": "ended", "status": status})

    def _listen_to(self, caller: Caller) -> None:
        """Hear a caller again that its fork has read from."""
        caller.is_read_by_fork = False
        self._poll.register(caller.connection, select.POLLIN)

    def _forget(self, caller: Caller) -> None:
        """A caller has ended: so does its program, as it would have with it."""
        if caller.fork is not None:
            signal_process(caller.fork.pid, signal.SIGKILL, group=False)
            if caller.fork.channel.fileno() in self._forks:
                self._close(caller.fork)
        if not caller.is_read_by_fork:
            self._poll.unregister(caller.connection)
        del self._callers[caller.connection.fileno()]
        caller.receiver.close()
