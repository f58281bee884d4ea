"""A disk of 64 GB that is full: no server, command or reader needs room on it.

The disk is a file with holes. What fills it is allocated and never written, so that it takes next to nothing here.
"""

import os
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.reliability.caches import disagreements
from tests.reliability.looks import Looks, models_in, restarts
from tests.support.images import Image
from tests.support.keepers import kill, serving
from tests.support.mounts import MountedStore, let_in, mountctl, trimsfs, unmount, wait_until
from tests.support.survival import Survived

DISK_BYTES = 64_000_000_000
FULL = "free some space"
FILES = 1000
"""Most small files that fill a disk, and most empty ones: more than the first block of a directory has room for."""


@pytest.fixture(params=["ext4", pytest.param("xfs", marks=pytest.mark.slow)])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty disk."""
    image = Image(request.param, tmp_path, size=DISK_BYTES)
    image.mount()
    try:
        image.mountpoint.chmod(0o755)
        let_in(tmp_path)
        yield image.mountpoint
    finally:
        image.remove()


@pytest.fixture
def store(store_directory: Path) -> Path:
    models = models_in(store_directory)
    let_in(models)
    return models


def fill(disk: Path) -> list[Path]:
    """Take all that is free, also what is reserved for root, and the room for names; the files that have it."""
    files = [disk / "filler"]
    descriptor = os.open(files[0], os.O_RDWR | os.O_CREAT, 0o600)
    try:
        end = 0
        for size in (1 << 30, 1 << 20, 4096):
            with suppress(OSError):
                while end < DISK_BYTES:
                    os.posix_fallocate(descriptor, end, size)
                    end += size
    finally:
        os.close(descriptor)
    # Pieces that no extent of the large one could take, then the rest of the directory's block: a name of three
    # letters takes no more than any other.
    for content, form in ((random.randbytes(4096), "small-{}"), (b"", "{:03}")):
        with suppress(OSError):
            for number in range(FILES):
                files.append(disk / form.format(number))
                files[-1].write_bytes(content)
    return files


@pytest.mark.parametrize("option", ["--cache-dir", "--log-file"])
def test_a_disk_that_is_full_from_the_start_is_told_with_what_to_do(
    disk: Path, store: Path, tmp_path: Path, option: str
) -> None:
    fill(disk)
    mountpoint = tmp_path / "models"
    places = {"--cache-dir": tmp_path / "cache", "--log-file": tmp_path / "log"} | {option: disk / "own"}
    done = trimsfs("mount", store, mountpoint, *(word for pair in places.items() for word in pair))
    unmount(mountpoint) if done.returncode == 0 else None
    assert (done.returncode, done.stderr.count("\n")) == (9, 1), done.stderr
    assert f"{disk / 'own'}: No space left on device" in done.stderr
    assert FULL in done.stderr
    assert option in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_disk_that_fills_up_serves_what_it_has_and_keeps_again_once_there_is_room(
    disk: Path, store: Path, tmp_path: Path, survived: Survived
) -> None:
    """Cache and log are on it."""
    cache, mountpoint, log = disk / "cache", tmp_path / "models", disk / "log"
    arguments = ("mount", store, mountpoint, "--cache-dir", cache, "--log-file", log)
    mount = MountedStore(mountpoint, cache)
    looks = Looks(mount, store)
    try:
        done = trimsfs(*arguments)
        assert done.returncode == 0, done.stderr
        looks.read("model-0/part-0", "model-0/part-1")
        assert trimsfs("pin", mountpoint / "model-0/part-1").returncode == 0
        fillers = fill(disk)
        looks.read()
        kill(mount)
        looks.read()
        done = mountctl("restart", mountpoint)
        assert done.returncode == 0, done.stderr
        serving(mount)
        looks.read()
        told = trimsfs("status", mountpoint)
        assert (told.returncode, FULL in told.stdout) == (1, True), told.stdout
        done = trimsfs("evict", mountpoint / "model-0/part-0")
        if disk.name == "ext4":  # what it frees is for root alone, until root has its reserve again
            assert (done.returncode, FULL in done.stderr) == (9, True), done.stderr
        else:
            assert done.returncode == 0, done.stderr
        done = trimsfs("pin", mountpoint / "model-2/part-0")
        assert (done.returncode, done.stderr.count("\n")) == (9, 1), done.stderr

        # Mounted anew, when the disk is as full, but for what was evicted.
        unmount(mountpoint)
        done = trimsfs(*arguments)
        assert done.returncode == 0, done.stderr
        assert FULL in done.stderr
        looks.read()
        assert mount.info("model-0/part-1")["pinned"]
        for file in fillers:
            file.unlink(missing_ok=True)
        recovery_s = looks.until_kept("model-3/part-0")
        looks.read()
        assert restarts(mount) == 0
        wait_until(lambda: trimsfs("status", mountpoint).returncode == 0)
        assert "Traceback" not in log.read_text()
        survived(
            f"disk of 64 GB full ({disk.name})",
            injected=2,
            operations=looks.operations,
            errors=looks.errors,
            wrong=len(looks.wrong),
            recovery_s=recovery_s,
        )
    finally:
        unmount(mountpoint)
    assert disagreements(cache) == []
