"""Processes that read a mount without a pause, compare every byte with the store's, and time every operation."""

import contextlib
import ctypes
import errno
import mmap
import os
import pickle
import random
import re
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

PIECE = 1 << 20
_CLONE_NEWNS, _CLONE_NEWPID = 0x00020000, 0x20000000
_MS_REC, _MS_SLAVE = 1 << 14, 1 << 19


@dataclass(slots=True)
class Report:
    """What a reader, or several, have seen. ``worst_s`` is the longest that each kind of operation took.

    ``errnos`` counts errors by name that a reader puts up with, ``errors`` tells of the others.
    """

    operations: int = 0
    errors: list[str] = field(default_factory=list)
    errnos: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    worst_s: dict[str, float] = field(default_factory=dict)

    def unexpected(self) -> Counter[str]:
        """How often each errno was met that is not put up with; what is no error of the system is a defect."""
        numbers = [re.search(r"Error: \[Errno (\d+)\]", text) for text in self.errors]
        return Counter("defect" if match is None else errno.errorcode[int(match[1])] for match in numbers)

    def add(self, other: "Report") -> None:
        """Count what another reader has seen as well."""
        self.operations += other.operations
        self.errors += other.errors
        self.errnos += other.errnos
        self.wrong += other.wrong
        for kind, seconds in other.worst_s.items():
            self.worst_s[kind] = max(seconds, self.worst_s.get(kind, 0.0))

    def compare(self, kind: str, name: str, right: bool) -> None:
        """Tell of an operation that gave wrong bytes or names."""
        if not right:
            self.wrong.append(f"{kind} {name}")

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Count an operation when it has ended well, and how long it took in any case."""
        began = time.monotonic()
        try:
            yield
            self.operations += 1
        finally:
            self.worst_s[kind] = max(time.monotonic() - began, self.worst_s.get(kind, 0.0))


class Rounds(Protocol):
    """What a process of `Readers` does again and again."""

    report: Report

    def round(self) -> None:
        """Do it once."""


class Reader:
    """One reader of the files below a mount, which are also in a directory."""

    def __init__(self, mount: Path, store: Path, seed: int) -> None:
        self._mount = mount
        self._store = store
        self._draw = random.Random(seed)
        self._names = sorted(str(path.relative_to(store)) for path in store.rglob("*") if path.is_file())
        self._kept: list[tuple[str, int, mmap.mmap]] = []
        self.report = Report()

    def round(self) -> None:
        """One of each operation on a file drawn at random; on one that has been open for long every other time."""
        name = self._draw.choice(self._names)
        with self.report.timing("ls"):
            listed = sorted(os.listdir((self._mount / name).parent))
        self.report.compare("ls", name, listed == sorted(os.listdir((self._store / name).parent)))
        with self.report.timing("ask"):  # for a new name, which only the server can answer
            known = (self._mount / f"absent-{os.getpid()}-{self.report.operations}").exists()
        self.report.compare("ask", "absent", not known)
        with self.report.timing("stat"):
            size = os.stat(self._mount / name).st_size
        self.report.compare("stat", name, size == os.stat(self._store / name).st_size)
        with self.report.timing("open"):
            descriptor = os.open(self._mount / name, os.O_RDONLY | os.O_CLOEXEC)
        self._read(name, descriptor)
        if len(self._kept) < 6:
            self._kept.append((name, descriptor, mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)))
        else:
            self._map(name, descriptor)
            os.close(descriptor)
            kept = self._draw.randrange(len(self._kept))
            name, descriptor, mapping = self._kept[kept]
            self._read(name, descriptor)
            offset = self._draw.randrange(len(mapping))
            with self.report.timing("touch"):
                found = mapping[offset : offset + 4096]
            self.report.compare("touch", name, found == self._content(name, offset, len(found)))
            if self._draw.random() < 0.1:
                del self._kept[kept]
                mapping.close()
                os.close(descriptor)

    def _read(self, name: str, descriptor: int) -> None:
        size = os.stat(self._store / name).st_size
        offset = self._draw.randrange(size)
        with self.report.timing("read"):
            found = os.pread(descriptor, PIECE, offset)
        self.report.compare("read", name, found == self._content(name, offset, PIECE))

    def _map(self, name: str, descriptor: int) -> None:
        with self.report.timing("mmap"), contextlib.closing(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)) as mapping:
            offset = self._draw.randrange(len(mapping))
            found = mapping[offset : offset + PIECE]
        self.report.compare("mmap", name, found == self._content(name, offset, PIECE))

    def _content(self, name: str, offset: int, size: int) -> bytes:
        with open(self._store / name, "rb") as file:
            return os.pread(file.fileno(), size, offset)


class Processes:
    """Processes that do rounds, each made by its number, and report when they are told to stop."""

    def __init__(self, make: Callable[[int], Rounds], directory: Path, *, count: int) -> None:
        self._pids: dict[int, Path] = {}
        for number in range(count):
            file = directory / f"reader-{number}"
            file.unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                _run(make, number, file)
            self._pids[pid] = file

    def stop(self, timeout_s: float = 30.0) -> Report:
        """Have them finish what they do, and say what they have seen. One that hangs is an error."""
        total = Report()
        for pid in self._pids:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        for pid, file in self._pids.items():
            while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
                if time.monotonic() > deadline:
                    total.errors.append(f"reader {pid} hangs in {Path(f'/proc/{pid}/wchan').read_text()}")
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    break
                time.sleep(0.01)
            if file.exists():
                total.add(pickle.loads(file.read_bytes()))
            elif ended[1]:
                total.errors.append(f"reader {pid} has ended with status {os.waitstatus_to_exitcode(ended[1])}")
        self._pids.clear()
        return total


class Readers(Processes):
    """Reader processes of what is in a directory as well."""

    def __init__(self, mount: Path, store: Path, directory: Path, *, count: int) -> None:
        super().__init__(lambda seed: Reader(mount, store, seed), directory, count=count)


class PodReaders(Processes):
    """Readers in mount and PID namespaces of their own, as in pods: later mounts of the host reach them."""

    def __init__(self, mount: Path, store: Path, directory: Path, *, count: int) -> None:
        super().__init__(lambda seed: _in_pod(lambda: Reader(mount, store, seed)), directory, count=count)


def _in_pod(make: Callable[[], Rounds]) -> Rounds:
    """Make rounds in a child with namespaces of its own, which is told to stop as this process is."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(_CLONE_NEWNS | _CLONE_NEWPID) == 0, os.strerror(ctypes.get_errno())
    assert libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None) == 0
    child = os.fork()
    if child == 0:
        assert os.getpid() == 1
        return make()
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    _, status = os.waitpid(child, 0)
    os._exit(0 if status == 0 else 1)


def _run(make: Callable[[int], Rounds], number: int, file: Path) -> None:
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    status = 1
    try:
        signal.signal(signal.SIGTERM, stop)
        reader = make(number)
        while not stopped:
            try:
                reader.round()
            except OSError:
                reader.report.errors.append(traceback.format_exc())
                if len(reader.report.errors) > 20:
                    break
        file.write_bytes(pickle.dumps(reader.report))
        status = 0
    finally:
        os._exit(status)
