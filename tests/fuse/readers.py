"""Processes that read a mount without a pause, compare every byte with the store's, and time every operation."""

import contextlib
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

PIECE = 1 << 20


@dataclass(slots=True)
class Report:
    """What a reader, or several, have seen. ``worst_s`` is the longest that each kind of operation took."""

    operations: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    worst_s: dict[str, float] = field(default_factory=dict)

    def errnos(self) -> Counter[str]:
        """How often each errno was met, by its name; what is no error of the system is counted as a defect."""
        numbers = [re.search(r"Error: \[Errno (\d+)\]", text) for text in self.errors]
        return Counter("defect" if match is None else errno.errorcode[int(match[1])] for match in numbers)

    def add(self, other: "Report") -> None:
        """Count what another reader has seen as well."""
        self.operations += other.operations
        self.errors += other.errors
        self.wrong += other.wrong
        for kind, seconds in other.worst_s.items():
            self.worst_s[kind] = max(seconds, self.worst_s.get(kind, 0.0))


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
        with self._operation("ls"):
            listed = sorted(os.listdir((self._mount / name).parent))
        self._compare("ls", name, listed == sorted(os.listdir((self._store / name).parent)))
        with self._operation("ask"):  # for a new name, which only the server can answer
            known = (self._mount / f"absent-{os.getpid()}-{self.report.operations}").exists()
        self._compare("ask", "absent", not known)
        with self._operation("stat"):
            size = os.stat(self._mount / name).st_size
        self._compare("stat", name, size == os.stat(self._store / name).st_size)
        with self._operation("open"):
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
            with self._operation("touch"):
                found = mapping[offset : offset + 4096]
            self._compare("touch", name, found == self._content(name, offset, len(found)))
            if self._draw.random() < 0.1:
                del self._kept[kept]
                mapping.close()
                os.close(descriptor)

    def _read(self, name: str, descriptor: int) -> None:
        size = os.stat(self._store / name).st_size
        offset = self._draw.randrange(size)
        with self._operation("read"):
            found = os.pread(descriptor, PIECE, offset)
        self._compare("read", name, found == self._content(name, offset, PIECE))

    def _map(self, name: str, descriptor: int) -> None:
        with self._operation("mmap"), contextlib.closing(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)) as mapping:
            offset = self._draw.randrange(len(mapping))
            found = mapping[offset : offset + PIECE]
        self._compare("mmap", name, found == self._content(name, offset, PIECE))

    def _content(self, name: str, offset: int, size: int) -> bytes:
        with open(self._store / name, "rb") as file:
            return os.pread(file.fileno(), size, offset)

    def _compare(self, kind: str, name: str, right: bool) -> None:
        if not right:
            self.report.wrong.append(f"{kind} {name}")

    @contextmanager
    def _operation(self, kind: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self.report.operations += 1
        self.report.worst_s[kind] = max(took, self.report.worst_s.get(kind, 0.0))


class Readers:
    """Reader processes, each of which reports when it is told to stop."""

    def __init__(self, mount: Path, store: Path, directory: Path, *, count: int) -> None:
        self._pids: dict[int, Path] = {}
        for seed in range(count):
            file = directory / f"reader-{seed}"
            pid = os.fork()
            if pid == 0:
                _run(Reader(mount, store, seed), file)
            self._pids[pid] = file

    def stop(self, timeout_s: float = 30.0) -> Report:
        """Have them finish what they do, and say what they have seen. One that hangs is an error."""
        total = Report()
        for pid in self._pids:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        for pid, file in self._pids.items():
            while os.waitpid(pid, os.WNOHANG) == (0, 0):
                if time.monotonic() > deadline:
                    total.errors.append(f"reader {pid} hangs in {Path(f'/proc/{pid}/wchan').read_text()}")
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    break
                time.sleep(0.01)
            if file.exists():
                total.add(pickle.loads(file.read_bytes()))
        self._pids.clear()
        return total


def _run(reader: Reader, file: Path) -> None:
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    status = 1
    try:
        signal.signal(signal.SIGTERM, stop)
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
