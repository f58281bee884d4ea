"""Imports modules so that forks have them, and finds those of which a fork would not do what a new process does."""

import importlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from trimsfs.extras.spawn.fork_server.child import be_killed_with_parent
from trimsfs.extras.spawn.fork_server.random_state import RandomState
from trimsfs.extras.spawn.fork_server.thread_count import ThreadCount, end_idle_pools

FAILED = "its import failed"
"""Begins the reason to leave a module out whose import may not fail another time."""
IMPORTS = "it imports "
"""Begins the reason to leave a module out that imports one that is left out: that one's name follows."""
FileState = tuple[int, int, int]
"""Inode number, size in bytes, and modification time in nanoseconds."""
_UNKNOWN = (0, 0, 0)
_TICK_NS = 10_000_000
"""So much may the time of a change be behind the clock."""


class UnfitError(Exception):
    """A module that must not be imported before a fork: its *name*, and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason


class Preloading:
    """Imports modules, one by one, and looks after each at what it did."""

    def __init__(self, threads: ThreadCount) -> None:
        self._threads = threads
        self._random = RandomState()
        self._directory = os.getcwd()
        self._environment = dict(os.environ)
        self._shared = _shared_memory()
        self._children = _children()
        self.files: dict[str, FileState] = {}
        """The files that modules were loaded from, as they were."""
        self.models: dict[str, FileState] = {}
        """Files that are mapped, as they were."""

    def sift(self, modules: Sequence[str], left_out: Iterable[str]) -> Iterator[UnfitError]:
        """Import *modules* as `load`, but have a fork try them first, and tell of each that is unfit.

        Who hears of it leaves it out. So this process never has what it should not have, and need not begin anew.
        """
        rest = list(modules)
        while (unfit := self._tried(rest, left_out)) is not None:
            at = next(place for place, name in enumerate(rest) if lies_in(name, [unfit.name]))
            self.load(rest[:at], left_out)
            del rest[: at + 1]
            yield unfit

    def _tried(self, modules: Iterable[str], left_out: Iterable[str]) -> UnfitError | None:
        """What is unfit first when a fork imports *modules*."""
        end_idle_pools()
        told = os.memfd_create("trimsfs-unfit")
        pid = os.fork()
        if pid == 0:
            try:
                be_killed_with_parent()
                self._random.restore()
                self.load(modules, left_out)
            except UnfitError as unfit:
                os.write(told, json.dumps([unfit.name, unfit.reason]).encode())
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        with open(told, "rb") as file:
            file.seek(0)
            text = file.read()
        return UnfitError(*json.loads(text)) if text else None

    def load(self, modules: Iterable[str], left_out: Iterable[str]) -> None:
        """Import *modules*, and before each the packages around it, but nothing that lies in what is *left_out*.

        Raises UnfitError.
        """
        skipped = tuple(left_out)
        began_at = time.time_ns()
        absent = [name for name in skipped if name not in sys.modules]
        with _Captured() as output, self._random.watched():
            for module in modules:
                for name in accumulate(module.split("."), "{}.{}".format):
                    if name in sys.modules or lies_in(name, skipped):
                        continue
                    try:
                        importlib.import_module(name)
                    except BaseException as error:  # whatever it is, the program must meet it, not this server
                        raise UnfitError(name, f"{FAILED}: {type(error).__name__}: {error}") from error
                    for stream in (sys.stdout, sys.stderr):
                        stream.flush()
                    if (other := next((other for other in absent if other in sys.modules), None)) is not None:
                        raise UnfitError(name, f"{IMPORTS}{other}")
                    if output.written:
                        raise UnfitError(name, "it prints when it is imported")
                    self._look(name)
        self.files = dict(_files())
        for path in self.files:
            if began_at - _TICK_NS <= _changed_at(path) <= time.time_ns():
                self.files[path] = _UNKNOWN  # a module may have been loaded from what it was before

    def _look(self, name: str) -> None:
        if (generator := self._random.used()) is not None:
            raise UnfitError(name, f"it seeds {generator}, or draws from it, when it is imported")
        if os.getcwd() != self._directory:
            raise UnfitError(name, "it changes the working directory")
        if _children() - self._children:
            raise UnfitError(name, "it starts a process")
        if device := _gpu_device():
            raise UnfitError(name, f"it uses CUDA ({device}): a fork cannot use what its parent began on a GPU")
        if len(os.listdir("/proc/self/task")) > 1:
            end_idle_pools()
            if self._threads.try_fork() > 1:
                raise UnfitError(name, f"it starts threads ({', '.join(self._threads.names)})")
        if "." not in name and _shared_memory() - self._shared:
            raise UnfitError(name, "it has memory that all forks would share and could write")

    def stale(self) -> str | None:
        """A file that has changed since a module was loaded from it, or it was mapped; None if none has."""
        for path, state in (*self.files.items(), *self.models.items()):
            if _state(path) != state:
                return path
        return None

    def environment_changes(self) -> dict[str, str | None]:
        """What imports did to the environment: new values, None for variables that they removed."""
        changed = {name: value for name, value in os.environ.items() if self._environment.get(name) != value}
        return changed | {name: None for name in self._environment if name not in os.environ}


class _Captured:
    """Standard output and error, written to memory instead."""

    def __init__(self) -> None:
        self._memory = os.memfd_create("trimsfs-output")
        self._kept: list[tuple[int, int]] = []

    @property
    def written(self) -> int:
        return os.fstat(self._memory).st_size

    def __enter__(self) -> "_Captured":
        self._kept = [(number, os.dup(number)) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(self._memory, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number, kept in self._kept:
            os.dup2(kept, number)
            os.close(kept)
        os.close(self._memory)


def imported_since(known: set[str], directory: str) -> list[str]:
    """The modules that this program has imported besides those *known*, in the order of their import.

    Those of its own *directory* are left out, as they may change, and those that no import statement finds.
    """
    found = []
    for name, module in list(sys.modules.items()):
        contents = getattr(module, "__dict__", {})
        spec = contents.get("__spec__")
        if name in known or name.startswith("__m") or spec is None or spec.name != name or spec.loader is None:
            continue
        path = contents.get("__file__")
        if path is None:
            if spec.origin in {"built-in", "frozen"}:
                found.append(name)
        elif isinstance(path, str) and not _is_own(path, directory):
            found.append(name)
    return found


def _is_own(path: str, directory: str) -> bool:
    """Whether a module is the program's own: in its directory, but not in an environment that lies there, too."""
    real = os.path.realpath(path)
    if not real.startswith(directory + os.sep):
        return False
    environments = (os.path.realpath(prefix) + os.sep for prefix in {sys.prefix, sys.base_prefix})
    return not any(prefix.startswith(directory + os.sep) and real.startswith(prefix) for prefix in environments)


def lies_in(name: str, others: Iterable[str]) -> bool:
    """Whether a module is one of *others*, or lies in a package of them."""
    return any(name == other or name.startswith(f"{other}.") for other in others)


def _files() -> Iterable[tuple[str, FileState]]:
    modules = [module for name, module in list(sys.modules.items()) if name != "__main__"]  # this server's own
    paths = {getattr(module, "__dict__", {}).get("__file__") for module in modules}
    directories = {path for path in sys.path if path.endswith(("site-packages", "dist-packages"))}
    for path in paths | directories:
        if isinstance(path, str) and (state := _state(path)) is not None:
            yield path, state


def _state(path: str) -> FileState | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _changed_at(path: str) -> int:
    try:
        return os.stat(path).st_ctime_ns
    except OSError:
        return 0


def _children() -> set[str]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return set(file.read().split())


def _gpu_device() -> str | None:
    """A device of NVIDIA's driver that this process has open."""
    if not os.path.exists("/dev/nvidiactl"):
        return None
    for number in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if path.startswith("/dev/nvidia"):
            return path
    return None


def _shared_memory() -> set[str]:
    """The shared mappings that this process may write, by address range."""
    with open("/proc/self/maps", errors="surrogateescape") as maps:
        fields = (line.split(None, 5) for line in maps)
        return {field[0] for field in fields if field[1][1] == "w" and field[1][3] == "s"}
