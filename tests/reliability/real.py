"""A real mount over a directory, driven one call at a time by the process of the test itself."""

import ctypes
import errno
import json
import mmap
import os
import random
import shutil
import stat
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c

from tests.reliability.caches import allocated
from tests.reliability.syscalls import libc, map_file
from tests.reliability.virtual import damage_some
from tests.support.keepers import kill
from tests.support.mounts import MountedStore, mounted, wait_until
from tests.support.parts import blob_files
from trimsfs.tiers.index.index import BlobIndex
from trimsfs.tiers.ranges import chunk_span
from trimsfs.types import CHUNK_SIZE

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
SETTLED_LIFE_S = 1.1
"""Servers that die younger are taken for hopeless after a while."""
MOST_WAIT_S = 0.6
LARGEST = 3 * CHUNK_SIZE
"""Bytes of the largest object."""
BLOCK = 4096


@dataclass(slots=True)
class Opened:
    """A descriptor, and a mapping that holds no descriptor of its own."""

    descriptor: int
    size: int
    address: int | None = None


class RealDriver:
    """Programs are this process. What a mapping does not give is EFAULT to a system call, so that nothing is killed."""

    def __init__(self, directory: Path, *options: str, most_restarts: int) -> None:
        self.chunk_size = CHUNK_SIZE
        self.most_restarts = most_restarts
        self.budget = 4 * CHUNK_SIZE
        self.keeps_idle = True
        self.ttl_s = 0.5
        self.slack_s = 0.1
        self._directory = directory
        self._root = self._store = directory / "store"
        self._store.mkdir(parents=True)
        self._files: dict[int, Opened] = {}
        self._tokens = 0
        self._damaged = False
        self._scratch = os.memfd_create("scratch")
        self._options = (
            *("--cache-size", f"{self.budget}", "--min-free", "0", "--host-size", f"{3 * CHUNK_SIZE}"),
            *("--metadata-ttl", f"{self.ttl_s}", "--retry-deadline", "1"),
            *options,
        )
        self._begin()

    def _begin(self) -> None:
        self._stack = ExitStack()
        # So that a store can be made one that root may not read.
        before = ("setpriv", "--bounding-set=-dac_read_search")
        mount = mounted(self._store, self._directory, *self._options, before=before)
        self._mount = self._stack.enter_context(mount)
        self._begun = time.monotonic()

    # Servers

    def kill(self) -> None:
        time.sleep(max(0.0, self._begun + SETTLED_LIFE_S - time.monotonic()))
        kill(self._mount)
        self._begun = time.monotonic()

    def remount(self, draw: random.Random, *, damage: bool) -> None:
        self._stack.close()
        self._check_index()
        if damage:
            damage_some(self._mount.cache, draw)
            self._damaged = True
        self._begin()

    def stop(self) -> None:
        for token in list(self._files):
            if self._files[token].descriptor >= 0:
                self.close(token)
            if token in self._files:
                self.unmap(token)
        self.heal()
        self._stack.close()
        os.close(self._scratch)
        shutil.rmtree(self._directory)

    def _check_index(self) -> None:
        """What the index says is in the blobs is there, unless it has been damaged."""
        index = BlobIndex(self._mount.cache / "index.sqlite")
        try:
            blobs = {path.name: path for path in blob_files(self._mount.cache)}
            for record in index.records(f"file://{self._store}"):
                loaded = index.load(record.token)
                for chunk in loaded[1] if loaded is not None and not self._damaged else []:
                    start, stop = chunk_span(chunk.chunk, record.generation.size, CHUNK_SIZE)
                    with blobs[record.token].open("rb") as file:
                        assert crc32c.crc32c(os.pread(file.fileno(), stop - start, start)) == chunk.crc
            assert set(blobs) <= {record.token for record in index.records(f"file://{self._store}")}
        finally:
            index.close()

    # The store

    def now(self) -> float:
        return time.monotonic()

    def write(self, path: str, content: bytes) -> None:
        """Replace a file at once, as one should."""
        new, place = self._directory / "new", self._root / path
        new.write_bytes(content)
        place.parent.mkdir(parents=True, exist_ok=True)
        new.rename(place)

    def remove(self, path: str) -> None:
        """Remove a file, and the directory that is empty then."""
        place = self._root / path
        place.unlink()
        if place.parent != self._root:
            with suppress(OSError):
                place.parent.rmdir()

    def fail(self, number: int) -> None:
        if number == errno.EACCES:
            self._store.chmod(0)
        else:
            self._root = self._directory / "away"
            self._store.rename(self._root)

    def heal(self) -> None:
        if self._root != self._store:
            self._root.rename(self._store)
            self._root = self._store
        self._store.chmod(0o755)

    # Programs

    def open(self, path: str) -> int:
        descriptor = os.open(self._mount.path / path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            os.close(descriptor)
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        self._tokens += 1
        self._files[self._tokens] = Opened(descriptor, status.st_size)
        return self._tokens

    def size(self, token: int) -> int:
        return self._files[token].size

    def whole(self, token: int) -> bool:
        """By what is on the disk: a server that follows a killed one verifies it anew when it is read."""
        file = self._files[token]
        residency = json.loads(os.getxattr(file.descriptor, "user.trims.residency"))
        return bool(residency["disk"] == file.size)

    def read(self, token: int, offset: int, size: int) -> bytes:
        pieces = []
        while size and (piece := os.pread(self._files[token].descriptor, size, offset)):
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return b"".join(pieces)

    def map(self, token: int) -> None:
        file = self._files[token]
        file.address = map_file(file.descriptor, file.size, mmap.PROT_READ, mmap.MAP_SHARED)

    def read_mapped(self, token: int, offset: int, size: int) -> bytes:
        file = self._files[token]
        assert file.address is not None
        view = memoryview((ctypes.c_char * file.size).from_address(file.address)).cast("B")[offset : offset + size]
        done = 0
        while done < len(view):
            done += os.pwrite(self._scratch, view[done:], done)
        return os.pread(self._scratch, size, 0)

    def close(self, token: int) -> None:
        file = self._files[token]
        os.close(file.descriptor)
        file.descriptor = -1
        self._done(token)

    def unmap(self, token: int) -> None:
        file = self._files[token]
        libc.munmap(file.address, file.size)
        file.address = None
        self._done(token)

    def _done(self, token: int) -> None:
        if self._files[token].descriptor < 0 and self._files[token].address is None:
            del self._files[token]

    def stat(self, path: str) -> int | None:
        status = os.stat(self._mount.path / path)
        return None if stat.S_ISDIR(status.st_mode) else status.st_size

    def listing(self, path: str) -> set[str]:
        return set(os.listdir(self._mount.path / path))

    def attribute(self, path: str, name: str) -> str:
        return os.getxattr(self._mount.path / path, f"user.trims.{name}").decode()

    def command(self, name: str, path: str) -> dict[str, Any]:
        directory, _, subject = path.rpartition("/")
        file = self._mount.path / directory / ".trims" / subject / name
        last: dict[str, Any] = json.loads(file.read_bytes().splitlines()[-1])
        return last

    def models(self) -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = json.loads((self._mount.path / ".trims/models").read_bytes())["models"]
        return models

    # Memory, time, the end

    def forget(self) -> None:
        DROP_CACHES.write_text("2")

    def wait(self, share: float) -> None:
        time.sleep(min(MOST_WAIT_S, share * self.ttl_s))

    def check(self) -> list[dict[str, Any]]:
        """What has come of chunks that then could not be had stays until nobody uses the file, and a moment longer."""
        in_use = int(self._mount.metrics()["trimsfs_disk_open_blobs"])
        if self._excess() > in_use * LARGEST:
            wait_until(lambda: self._excess() <= in_use * LARGEST, timeout_s=5)
        return self.models()

    def _excess(self) -> int:
        """Bytes that the cache takes beyond its budget."""
        cache = self._mount.cache
        return allocated(cache) - self.budget - BLOCK * len(blob_files(cache))

    def settle(self) -> None:
        """Nothing is in use, and the kernel knows of the control file that says so, and nothing else."""
        wait_until(lambda: self._at_rest(self._mount), timeout_s=20)
        wait_until(lambda: self._excess() <= 0, timeout_s=5)

    def _at_rest(self, mount: MountedStore) -> bool:
        self.forget()
        metrics = mount.metrics()
        used = ("files_open_handles", "disk_open_blobs", "fetch_in_flight", "fetch_waiting")
        return metrics["trimsfs_names_inodes"] <= 3 and not any(metrics[f"trimsfs_{name}"] for name in used)
