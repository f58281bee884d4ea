"""Files that are replaced under programs that keep a number for long: nobody reads a byte of two versions."""

import errno
import mmap
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.support.mount_namespace import mounted_apart
from tests.support.mounts import MountedStore, mounted, wait_until

NAME = "model.safetensors"
STRESS_S = 6.0
MODES = {
    "passed through": (),
    "streamed": ("--cold-open", "stream"),
    "without passthrough": ("--no-passthrough",),
}


def content(version: int) -> bytes:
    """A file of a size of its own, each of whose lines names its version."""
    return b"%08d\n" * (20_000 + 3_000 * (version % 7)) % ((version,) * (20_000 + 3_000 * (version % 7)))


def replace(store: Path, version: int) -> None:
    (store / "new").write_bytes(content(version))
    (store / "new").replace(store / "m" / NAME)


@contextmanager
def bound(target: Path, mountpoint: Path) -> Iterator[Path]:
    """A bind mount of the file: who opens it looks nothing up."""
    target.touch()
    with mounted_apart(mountpoint, "mount", "--bind", mountpoint / "m" / NAME, target) as root:
        yield root / target.relative_to("/")


@pytest.fixture(params=MODES)
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MountedStore]:
    (tmp_path / "store/m").mkdir(parents=True)
    replace(tmp_path / "store", 0)
    with mounted(tmp_path / "store", tmp_path, "--metadata-ttl", "1", *MODES[request.param]) as mount:
        yield mount


def _reads(path: Path, wanted: bytes, name: Path | None = None) -> bool:
    """Whether a file has a content, after a lookup of another name of it."""
    assert name is None or name.exists()
    return path.read_bytes() == wanted


def test_a_bind_mount_of_a_file_shows_what_its_name_leads_to_once_nobody_has_it_open(
    mount: MountedStore, tmp_path: Path
) -> None:
    named = mount.path / "m" / NAME
    with bound(tmp_path / "file", mount.path) as file:
        for version in range(1, 4):
            before, after = content(version - 1), content(version)
            wait_until(partial(_reads, file, before))
            number = file.stat().st_ino
            with file.open("rb") as held, mmap.mmap(held.fileno(), 0, prot=mmap.PROT_READ) as mapping:
                replace(tmp_path / "store", version)
                wait_until(partial(_reads, named, after))
                assert mapping[:] == before
            # A lookup of the name renews the number.
            wait_until(partial(_reads, file, after, named))
            assert file.stat().st_size == len(after)
            assert file.stat().st_ino == number


def _in_pieces(descriptor: int) -> bytes:
    pieces = []
    while piece := os.read(descriptor, 4096):
        pieces.append(piece)
    return b"".join(pieces)


def _at_once(descriptor: int) -> bytes:
    return os.pread(descriptor, 1 << 20, 0)


def test_replaced_all_the_time_files_are_read_of_one_version(mount: MountedStore, tmp_path: Path) -> None:
    wrong: list[str] = []
    reads = [0]
    until = time.monotonic() + STRESS_S

    def reading(path: Path, *, in_pieces: bool) -> None:
        while time.monotonic() < until:
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                wrong.append(f"open: {error}") if error.errno != errno.ESTALE else None
                continue
            try:
                found = (_in_pieces if in_pieces else _at_once)(descriptor)
                again = os.pread(descriptor, 100, 0)
            except OSError as error:
                wrong.append(f"read: {error}") if error.errno != errno.ESTALE else None
                continue
            finally:
                os.close(descriptor)
            reads[0] += 1
            if again != found[:100] or found != content(int(found[:8])):
                wrong.append(f"{len(found)} bytes, versions {sorted(set(found.split()))[:3]}, then {again[:9]!r}")

    named = mount.path / "m" / NAME
    with bound(tmp_path / "file", mount.path) as file:
        threads = [
            threading.Thread(target=reading, args=(path,), kwargs={"in_pieces": in_pieces})
            for path in (named, named, file)
            for in_pieces in (True, False)
        ]
        for thread in threads:
            thread.start()
        version = 0
        while time.monotonic() < until:
            version += 1
            replace(tmp_path / "store", version)
            time.sleep(0.05 * (version % 4))
        for thread in threads:
            thread.join(60)
    assert wrong == []
    assert reads[0] > 100
