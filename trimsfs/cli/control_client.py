"""Finds and reads the control files of a mount."""

import errno
import json
import os
import pickle
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Generic, TypeVar, cast

from trimsfs.cli import control_reader
from trimsfs.cli.output import left_out
from trimsfs.errors import (
    NoSuchEntryError,
    NotMountedError,
    NotPermittedError,
    ObjectChangedError,
    StoreAccessError,
    StoreUnavailableError,
    TrimsError,
)
from trimsfs.mountinfo import Mount, file_systems, mount_of
from trimsfs.polling import readable
from trimsfs.processes import start_child

T = TypeVar("T")

ANSWER_TIMEOUT_S = 10.0
CONTROL_NAME = ".trims"
STANDSTILL_S = 30.0
"""How long a query may use no processor time before its mount counts as hanging."""


def mount_over(path: Path) -> Mount:
    """Find the mount that a path lies on, without checking that it answers. Raises NotMountedError."""
    for candidate in (os.path.abspath, os.path.realpath):
        # abspath comes first: it does not touch a mount that may hang.
        mount = mount_of(Path(candidate(path)))
        if mount is not None:
            return mount
    problem = "is not on a trimsfs mount" if os.path.lexists(path) else "does not exist"
    raise NotMountedError(f"{path} {problem}: `trimsfs status` shows the mounts of this host")


def mount_of_path(path: Path) -> Mount:
    """Find the mount that a path lies on, and check that it answers. Raises NotMountedError, NotPermittedError."""
    mount = mount_over(path)
    check_answers(mount.mountpoint)
    return mount


def check_answers(mountpoint: Path) -> None:
    """Check that a mount answers. Raises NotMountedError after ANSWER_TIMEOUT_S; NotPermittedError."""
    # A child process asks: a process that waits for a hanging mount cannot be killed.
    process = subprocess.Popen(
        ["stat", "-f", "--", mountpoint],
        env={**os.environ, "LC_ALL": "C"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, message = process.communicate(timeout=ANSWER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise NotMountedError(
            f"{mountpoint} does not answer: its keeper replaces a hanging server after 30 s: wait, "
            f"or run `mountctl restart {mountpoint}`"
        ) from None
    if process.returncode != 0:
        cause = message.strip().rpartition(": ")[2]
        if cause == "Permission denied":
            raise NotPermittedError(f"{mountpoint}: {cause}: it is another user's mount")
        raise NotMountedError(f"{mountpoint}: {cause}: its server is gone: unmount it with `trimsfs umount`")


@dataclass(slots=True)
class _Asking(Generic[T]):
    """A child process that queries a mount, and its output so far; ``moved`` is when it last made progress."""

    mount: Mount
    pid: int
    moved: float = field(default_factory=time.monotonic)
    time_used: tuple[str, ...] = ()
    said: bytes = b""

    def stands_still(self) -> bool:
        """Whether it has made no progress for STANDSTILL_S."""
        try:
            used = tuple(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13])
        except OSError:
            used = ()  # it has ended
        if used != self.time_used:
            self.time_used, self.moved = used, time.monotonic()
        return time.monotonic() > self.moved + STANDSTILL_S

    def result(self) -> T | TrimsError:
        """Wait for its end; its result, or the error that it got."""
        os.waitpid(self.pid, 0)
        unexpected = TrimsError(f"{self.mount.mountpoint}: the process that queried it has ended: try again")
        return cast("T | TrimsError", pickle.loads(self.said)) if self.said else unexpected  # noqa: S301 - own child


class Questions(Generic[T]):
    """Queries to mounts, in child processes: a process that waits for a hanging mount cannot be killed."""

    def __init__(self) -> None:
        self._asking: dict[int, _Asking[T]] = {}
        self._killed: list[int] = []

    def ask(self, mount: Mount, ask: Callable[[Mount], T]) -> None:
        """Start to query a mount with *ask*."""
        receiver, child = start_child(partial(_ask, partial(ask, mount)))
        self._asking[receiver] = _Asking(mount, child)

    def under_way(self) -> list[Mount]:
        """The mounts that have not answered."""
        return [each.mount for each in self._asking.values()]

    def answers(self, timeout_s: float, *beside: int) -> Iterator[tuple[Mount, T | TrimsError]]:
        """The answers that come within *timeout_s*, or until a descriptor *beside* can be read; a NotMountedError of a
        mount that hangs."""
        for receiver in self._asking.keys() & set(readable([*self._asking, *beside], timeout_s)):
            piece = os.read(receiver, 1 << 20)
            self._asking[receiver].said += piece
            if not piece:
                os.close(receiver)
                query = self._asking.pop(receiver)
                yield query.mount, query.result()
        for receiver in [receiver for receiver, each in self._asking.items() if each.stands_still()]:
            os.close(receiver)
            query = self._asking.pop(receiver)
            os.kill(query.pid, signal.SIGKILL)
            self._killed.append(query.pid)
            place = query.mount.mountpoint
            yield query.mount, NotMountedError(f"{place} does not answer for {STANDSTILL_S:.0f} s: see its log")
        self._killed = [pid for pid in self._killed if os.waitpid(pid, os.WNOHANG) == (0, 0)]


def ask_each(mounts: Sequence[Mount], ask: Callable[[Mount], T]) -> Iterator[tuple[Mount, T | TrimsError]]:
    """What *ask* finds out about each mount, all at once, as `Questions` has it."""
    questions = Questions[T]()
    for mount in mounts:
        questions.ask(mount, ask)
    while questions.under_way():
        yield from questions.answers(0.5)


def records_of(
    path: Path | None, ask: Callable[[Mount], list[dict[str, Any]]], failures: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """What *ask* lists of all mounts, or what of it is at or below a *path*. Raises TrimsError if its mount fails.

    Of all mounts, those that do not answer are left out, and added to the *failures*.
    """
    if path is None:
        return [each for _, records in left_out(ask_each(file_systems(), ask), failures) for each in records]
    records, below = ask(mount_over(path)), os.path.realpath(path)
    return [each for each in records if PurePath(each["path"]).is_relative_to(below)]


def on_this_host(mount: Mount, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a mount tells of paths, with their paths on this host; without those that are not mounted there."""
    paths = [(record, PurePath("/", record["path"])) for record in records]
    return [
        record | {"path": str(mount.mountpoint / path.relative_to(mount.root))}
        for record, path in paths
        if path.is_relative_to(mount.root)
    ]


def path_of_key(path: Path, key: str) -> Path:
    """The path on this host of a key of the mount that a *path* lies on."""
    mount = mount_of_path(path)
    return mount.mountpoint / os.path.relpath(f"/{key}", mount.root)


def _ask(ask: Callable[[], object], sender: int) -> None:
    """Run a query in this child process, and send its result."""
    try:
        result = ask()
    except TrimsError as error:
        result = error
    with os.fdopen(sender, "wb") as pipe:
        pickle.dump(result, pipe)


def control_directory(path: Path) -> Path:
    """The directory with the control files of a file or directory. Raises NotMountedError, NoSuchEntryError."""
    mount_of_path(path)
    path = Path(os.path.realpath(path))
    try:
        directory = path.is_dir()
        if not directory:
            path.stat()
    except OSError as error:
        raise translated(error, path) from error
    return path / CONTROL_NAME / CONTROL_NAME if directory else path.parent / CONTROL_NAME / path.name


def read_json(path: Path) -> dict[str, Any]:
    """The first line of a control file, parsed."""
    return next(read_lines(path))


def read_lines(path: Path, *, about: Path | None = None, again: bool = False) -> Iterator[dict[str, Any]]:
    """The lines of a control file as they arrive; closing the iterator cancels a command. Errors name *about*.

    With *again*, a command begins anew on the next server if its own ends.
    """
    try:
        yield from map(json.loads, control_reader.read_lines(path, again=again))
    except OSError as error:
        raise translated(error, about or path) from error


def read_text(path: Path) -> str:
    """The text of a control file."""
    try:
        return control_reader.read_bytes(path).decode()
    except OSError as error:
        raise translated(error, path) from error


def translated(error: OSError, path: Path) -> TrimsError:
    """The TrimsError for an OSError of a path on a mount."""
    message = f"{path}: {error.strerror}"
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return NoSuchEntryError(message)
        case errno.EPERM:
            return NotPermittedError(f"{message}: only root, the owner of the mount and its --control-gid may do this")
        case errno.EACCES:
            return StoreAccessError(f"{message}: the mount's modes or the store's credentials deny it: see its log")
        case errno.ESTALE:
            return ObjectChangedError(f"{message}: replaced or deleted in the store: try again")
        case errno.ENOTCONN:
            return NotMountedError(f"{message}: its server is gone: unmount it with `trimsfs umount`")
        case _:
            return StoreUnavailableError(f"{message}: see the log of the mount")
