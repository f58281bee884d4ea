"""The fork servers of a user: where their sockets are, how one is started, and how many there may be."""

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from trimsfs.extras.spawn.messages import Receiver, peer, raised, send
from trimsfs.extras.spawn.python_command import PlainError

TYPE_CHECKING = False  # type checkers take it as true; `import typing` would take time
if TYPE_CHECKING:
    from typing import Any

DIRECTORY = "TRIMSFS_SPAWN_DIR"
"""The environment variable that names the directory of the sockets, in place of the user's runtime directory."""
MOST_SERVERS = 8
MOST_MEMORY = 0.25
"""The part of the host's memory that servers may have, before idle ones make room."""
ANSWER_S, LOCK_S, LOCK_PAUSE_S = 1.0, 10.0, 0.01
PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fork_server", "__main__.py")
PADDING = "-" * 4096
"""The last argument of a fork server: its program has room there for its own command line, as ps shows it."""
_KINDS = ("socket", "settings", "log")
_KEY_LENGTH = 32


class Directory:
    """A directory of sockets that only this user can enter. Raises PlainError if there is none."""

    def __init__(self) -> None:
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        default = f"{runtime}/trimsfs-spawn" if runtime else f"/tmp/trimsfs-spawn-{os.geteuid()}"  # noqa: S108 - it is checked
        self.path = os.environ.get(DIRECTORY) or default
        try:
            with suppress(FileExistsError):
                os.mkdir(self.path, 0o700)
            self._descriptor = os.open(self.path, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            status = os.fstat(self._descriptor)
        except OSError as error:
            raise PlainError(f"{self.path}: {error.strerror}: set {DIRECTORY} to a directory of yours") from error
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise PlainError(f"{self.path} is not a directory that only you can write: set {DIRECTORY} to one")

    def path_of(self, key: str, kind: str) -> str:
        """The path of a server's file: its ``socket``, ``settings`` or ``log``."""
        return f"{self.path}/{key}.{kind}"

    def _address(self, key: str) -> str:
        """A server's socket, by a path that is short: the kernel takes 107 bytes."""
        return f"/proc/self/fd/{self._descriptor}/{key}.socket"

    def names(self) -> list[str]:
        """The keys of all servers, those that have ended as well, or have never begun."""
        parts = [name.partition(".") for name in os.listdir(self.path)]
        return sorted({key for key, _, kind in parts if kind in _KINDS and len(key) == _KEY_LENGTH})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from starting servers meanwhile. Raises PlainError if that takes too long."""
        import fcntl  # noqa: PLC0415 - only who starts a server needs it

        descriptor = os.open(f"{self.path}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        give_up_at = time.monotonic() + LOCK_S
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > give_up_at:
                        raise PlainError(f"{self.path}/lock is held by a process that does not go on") from None
                time.sleep(LOCK_PAUSE_S)
            yield
        finally:
            os.close(descriptor)

    def connect(self, key: str) -> socket.socket | None:
        """Connect to a server; None if it does not run."""
        return _connected(self._address(key))

    def ask(self, key: str, what: str) -> "tuple[int, dict[str, Any]] | None":
        """A server's pid and its answer to ``tell`` or ``stop``; None if it has ended, no answer if it is busy."""
        return _asked(self.connect(key), what)

    def clean(self) -> None:
        """Remove the files of servers that have ended. Raises PlainError and OSError."""
        with self.locked():
            for key in self.names():
                if self._has_ended(key):
                    self._forget(key)

    def _has_ended(self, key: str) -> bool:
        """Whether nothing listens at a server's socket. While this process has the lock, nothing will."""
        with socket.socket(socket.AF_UNIX) as channel:
            channel.setblocking(False)
            try:
                channel.connect(self._address(key))
            except (ConnectionRefusedError, FileNotFoundError):
                return True
            except OSError:
                pass  # it may be busy
        return False

    def _forget(self, key: str) -> None:
        for kind in _KINDS:
            with suppress(FileNotFoundError):
                os.unlink(self.path_of(key, kind))

    def start(self, key: str, line: list[str], environment: "dict[str, str]", settings: "dict[str, Any]") -> None:
        """Start a server unless one runs. *line* is its interpreter with options. Raises PlainError."""
        try:
            with self.locked():
                if not self._has_ended(key):
                    return
                self._make_room()
                try:
                    self._start(key, line, environment, settings)
                except OSError:
                    self._forget(key)
                    raise
        except OSError as error:
            raise PlainError(f"no fork server: {error}") from error

    def _start(self, key: str, line: list[str], environment: "dict[str, str]", settings: "dict[str, Any]") -> None:
        path = self.path_of(key, "settings")
        with open(path, "w") as file:
            json.dump(settings, file)
        log = os.open(
            self.path_of(key, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        log = raised(log, 3)  # this process may have closed a standard stream, whose number is the server's
        listener = new_socket()
        try:
            listener.bind(self._address(key))
            actions = [
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
                *((os.POSIX_SPAWN_CLOSE, number) for number in _inheritable() if number > 2),
                (os.POSIX_SPAWN_DUP2, listener.fileno(), listener.fileno()),
            ]

            def begin() -> None:
                listener.listen(socket.SOMAXCONN)  # the kernel takes who does that for the server: not this process
                os.posix_spawn(
                    line[0],
                    [*line, PROGRAM, str(listener.fileno()), "-1", "0", path, PADDING],
                    environment,
                    file_actions=actions,
                    setsid=True,
                    setsigmask=[],
                    setsigdef=signal.valid_signals(),
                )

            _in_between(begin)
        finally:
            listener.close()
            os.close(log)

    def _make_room(self) -> None:
        """Have idle servers end where there are too many, or they have too much memory. Raises PlainError."""
        idle: list[tuple[float, str]] = []
        count, memory = 0, 0
        sizes = {}
        for key in self.names():
            if self._has_ended(key):
                self._forget(key)
                continue
            if (answer := self.ask(key, "tell")) is None:
                continue
            pid, facts = answer
            count += 1
            sizes[key] = memory_of(pid)
            memory += sizes[key]
            if facts and not facts["running"]:
                idle.append((facts["idle_s"], key))
        idle.sort()
        limit = MOST_MEMORY * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        while idle and (count >= MOST_SERVERS or memory > limit):
            _, key = idle.pop()
            self.ask(key, "stop")
            self._forget(key)
            count, memory = count - 1, memory - sizes[key]
        if count >= MOST_SERVERS:
            raise PlainError(f"{count} fork servers run programs already, and there may be no more")


def connect(path: str) -> socket.socket | None:
    """Connect to the server at a socket; None if none listens there."""
    try:
        with short_path(path) as address:
            return _connected(address)
    except OSError:
        return None


def ask(path: str, what: str) -> "tuple[int, dict[str, Any]] | None":
    """As `Directory.ask`, of the server at a socket."""
    return _asked(connect(path), what)


@contextmanager
def short_path(path: str) -> Iterator[str]:
    """A path of a socket that is short: the kernel takes 107 bytes. Raises OSError."""
    descriptor = os.open(os.path.dirname(path) or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{os.path.basename(path)}"
    finally:
        os.close(descriptor)


def new_socket() -> socket.socket:
    """A Unix socket whose number is none of a standard stream. Raises OSError."""
    return socket.socket(fileno=raised(socket.socket(socket.AF_UNIX).detach(), 3))


def _in_between(start: Callable[[], object]) -> None:
    """Start a process from one that ends at once: it is no child of this one. Raises OSError.

    The program that this process may become would have a child that it did not start, and wait for it.
    """
    between = os.fork()
    if between == 0:
        number = 1
        try:
            start()
            number = 0
        except OSError as error:
            number = error.errno or number
        finally:
            os._exit(number)
    with suppress(ChildProcessError):  # nobody waits where SIGCHLD is ignored
        _, status = os.waitpid(between, 0)
        if number := os.waitstatus_to_exitcode(status):
            raise OSError(number, os.strerror(abs(number)))


def _connected(address: str) -> socket.socket | None:
    channel = socket.socket(socket.AF_UNIX)
    try:
        channel.settimeout(ANSWER_S)
        channel.connect(address)
    except OSError:
        channel.close()
        return None
    return channel


def _asked(channel: socket.socket | None, what: str) -> "tuple[int, dict[str, Any]] | None":
    if channel is None:
        return None
    receiver = Receiver(channel)
    try:
        pid, _, _ = peer(channel)
        try:
            if receiver.wait()[0]["is"] != "here":
                return pid, {}
            send(channel, {"do": what})
            return pid, receiver.wait()[0]
        except TimeoutError:
            return pid, {}
        except (EOFError, OSError):
            return None
    finally:
        receiver.close()


def memory_of(pid: int) -> int:
    """The memory of a process in bytes, what it shares with others divided by their number; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    except OSError:
        return 0


def _inheritable() -> list[int]:
    from trimsfs.extras.spawn.caller import inherited_descriptors  # noqa: PLC0415

    return inherited_descriptors()


def say(line: str) -> None:
    """Print one line to standard error, where somebody reads it."""
    with suppress(OSError):
        print(f"trimsfs: {line}", file=sys.stderr, flush=True)
