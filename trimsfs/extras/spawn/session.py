"""Has a program forked, and stands for it in the caller's process tree until it ends: signals, stops, exit status."""

import fcntl
import os
import resource
import signal
import socket
import time
from collections.abc import Sequence
from contextlib import suppress

from trimsfs.extras.spawn import caller
from trimsfs.extras.spawn.messages import PROTOCOL, Receiver, peer, send
from trimsfs.extras.spawn.models import files_of
from trimsfs.extras.spawn.python_command import PlainError, PythonCommand, parse
from trimsfs.extras.spawn.servers import Directory, connect, say

TYPE_CHECKING = False  # type checkers take it as true; `import typing` would take time
if TYPE_CHECKING:
    from typing import Any

IDLE_S = 600.0
LOOK_S, START_S, MOST_LOOKS = 1.0, 120.0, 3
"""How often a caller looks whether the fork server runs, and how long it waits until it runs the program itself."""
ATTEMPTS = 4
LEAST_FILES = 256
"""Who may open fewer files than this would see that a fork has some more from the beginning."""
_EVERY_SIGNAL = signal.valid_signals()
_BY_KERNEL = 0x80
"""``si_code`` of a signal that a terminal sends, to a whole process group."""


def spawn(
    words: Sequence[str], *, preload: Sequence[str], models: Sequence[str], vary: Sequence[str], idle_s: float = IDLE_S
) -> int:
    """Run a program in a fork, and return its exit status. Ends by a signal if the program does.

    Raises PlainError or OSError if it has not been run, and must be run as it is.
    """
    command = parse(words, os.environ)
    if (most := resource.getrlimit(resource.RLIMIT_NOFILE)[1]) < LEAST_FILES:
        raise PlainError(f"it may open {most} files, and a fork has some from the beginning")
    status = caller.Status()
    files = files_of(models)
    directory = caller.directory_of(command)
    environment = caller.common(os.environ, vary)
    imports = [PROTOCOL, list(preload), directory if preload else caller.script_of(command), files, idle_s]
    try:
        key = caller.key(command, environment, status, imports)
    except OSError as error:
        raise PlainError(f"{error.filename}: {error.strerror}") from error
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    settings = {
        "title": " ".join([*command.line[:1], command.target]),
        "preload": list(preload),
        "directory": directory if preload else "",
        "models": [os.path.abspath(model) for model in models],
        "idle_s": idle_s,
        "learned": os.path.join(cache, "trimsfs", "spawn", f"{key}.json"),
        "joining": None,
    }
    session = _Session(_order(command, status, directory))
    servers = Directory()
    for _ in range(ATTEMPTS):
        channel = servers.connect(key)
        if channel is None:
            servers.start(key, [command.path, *command.options], environment, settings)
        elif (ended := session.run(channel)) is not None:
            return ended
    raise PlainError(f"the fork server ends when it starts: see {servers.path_of(key, 'log')}")


def spawn_at(path: str, words: Sequence[str]) -> int:
    """Run a program in a fork of the server at a socket, as `spawn`."""
    command = parse(words, os.environ)
    session = _Session(_order(command, caller.Status(), caller.directory_of(command)))
    for _ in range(ATTEMPTS):
        channel = connect(path)
        if channel is None:
            raise PlainError(f"no fork server listens at {path}, or not to this user")
        if (ended := session.run(channel)) is not None:
            return ended
    raise PlainError(f"the fork server at {path} does not answer: it has ended, or is of another user")


def _order(command: PythonCommand, status: caller.Status, directory: str) -> "dict[str, Any]":
    return caller.facts(command, os.environ, status) | {"directory": directory}


class _Session:
    def __init__(self, order: "dict[str, Any]") -> None:
        self._order = order
        self._numbers = caller.inherited_descriptors()

    def run(self, channel: socket.socket) -> int | None:
        """Run the program; None if the server has ended before that. Raises PlainError, and OSError before it runs."""
        receiver = Receiver(channel)
        try:
            return self._follow(channel, receiver) if self._ready(channel, receiver) else None
        finally:
            receiver.close()

    def _ready(self, channel: socket.socket, receiver: Receiver) -> bool:
        """Whether a fork waits for the word to run. Raises PlainError."""
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            answer = _answer(channel, receiver)
            if answer["is"] == "here":
                if answer.get("protocol") != PROTOCOL:
                    raise PlainError("the fork server is of another version of trimsfs: start it anew")
                with suppress(BrokenPipeError):  # it may have said why
                    send(channel, {"do": "run"})
                answer = _answer(channel, receiver)
            if answer["is"] == "forked":  # by the fork alone is the order read
                with suppress(BrokenPipeError):
                    send(channel, self._order | {"descriptors": self._numbers}, [here, *self._numbers])
                answer = _answer(channel, receiver)
        except (EOFError, OSError):
            return False  # the server has ended meanwhile
        finally:
            os.close(here)
        if answer["is"] == "again":
            return False
        if answer["is"] == "ended":
            raise PlainError("the fork ended before it ran")
        if answer["is"] == "refused":
            raise PlainError(answer["why"])
        for note in answer["notes"]:
            say(note)
        return True

    def _follow(self, channel: socket.socket, receiver: Receiver) -> int | None:
        """Have the program run, and pass on what happens to it and to this process, until it ends.

        None if the server has ended before it heard that.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _EVERY_SIGNAL)
        channel.setblocking(False)
        try:
            send(channel, {"do": "go"})
        except OSError:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return None
        fcntl.fcntl(channel, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(channel, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)  # SIGIO tells of messages
        for number in self._numbers:
            if number != 2:
                _close(number)  # a reader of the program's output must see its end when the program ends
        while True:
            if (ended := _heard(receiver)) is not None:
                return _end(ended)
            arrived = signal.sigtimedwait(_EVERY_SIGNAL, LOOK_S)
            if arrived is None or arrived.si_signo == signal.SIGCHLD:
                continue
            if arrived.si_signo == signal.SIGIO and arrived.si_code > 0:
                continue  # of the socket
            group = arrived.si_code == _BY_KERNEL
            with suppress(OSError):  # the server has ended: the next look tells
                send(channel, {"do": "signal", "number": arrived.si_signo, "group": group})


def _answer(channel: socket.socket, receiver: Receiver) -> "dict[str, Any]":
    """Wait for the server's answer. Raises EOFError, OSError, and PlainError if it does not run."""
    server, _, _ = peer(channel)
    give_up_at = time.monotonic() + START_S
    channel.settimeout(LOOK_S)
    looks = 0
    while True:
        try:
            return receiver.wait()[0]
        except TimeoutError:
            looks = looks + 1 if _is_stopped(server) else 0
            if looks >= MOST_LOOKS:
                raise PlainError(f"the fork server, pid {server}, is stopped") from None
            if time.monotonic() > give_up_at:
                raise PlainError(f"the fork server, pid {server}, has not answered for {START_S:.0f} s") from None


def _is_stopped(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] in {"T", "t"}
    except OSError:
        return False


def _heard(receiver: Receiver) -> int | None:
    """Do what the server has told; the wait status of the program once it has ended."""
    while True:
        while (whole := receiver.message()) is not None:
            message, _ = whole
            if message["is"] == "ended":
                return int(message["status"])
        try:
            receiver.read()
        except BlockingIOError:
            return None
        except (EOFError, OSError):
            say("the fork server has ended, and the program with it")
            return int(signal.SIGKILL)  # by which the kernel ended the program


def _end(status: int) -> int:
    """The exit status of a program; ends this process by the signal that ended the program."""
    if not os.WIFSIGNALED(status):
        return os.waitstatus_to_exitcode(status)
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if number not in {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    return 128 + number


def _close(number: int) -> None:
    with suppress(OSError):
        os.close(number)
