"""What a mount does when its cache is full, frozen, failing, damaged or gone, and its server short of something."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.reliability.caches import disagreements
from tests.reliability.looks import SIZES, Looks, models_in, restarts
from tests.support.images import Image
from tests.support.keepers import keeper, kill, serving
from tests.support.memory_group import memory_group
from tests.support.mounts import MountedStore, mounted, trimsfs, wait_until
from tests.support.parts import blob_files, flip_byte
from tests.support.survival import Survived
from tests.support.tmpfs import tmpfs

slow = pytest.mark.slow
NO_MARGIN = ("--min-free", "0")
WHOLE = sum(SIZES)
"""Bytes of a model."""
FROZEN_S = 20
"""How long a disk is frozen at most."""


@pytest.fixture
def store(store_directory: Path) -> Path:
    return models_in(store_directory)


@pytest.fixture
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Image]:
    """A file system for the cache alone: by default XFS; its kind and how it is mounted are the parameters."""
    kind, options = getattr(request, "param", ("xfs", "loop"))
    image = Image(kind, tmp_path)
    image.mount(options)
    image.mountpoint.chmod(0o755)
    try:
        yield image
    finally:
        image.remove()


@contextlib.contextmanager
def cached_on(image: Image, store: Path, tmp_path: Path) -> Iterator[Looks]:
    """Looks at a mount whose cache lies on a file system of its own."""
    places = ("--cache-dir", str(image.mountpoint / "cache"))
    with mounted(store, tmp_path / "mount", *places, *NO_MARGIN) as mount:
        yield Looks(MountedStore(mount.path, image.mountpoint / "cache"), store)


@contextlib.contextmanager
def cached_in_memory(size: int, store: Path, tmp_path: Path) -> Iterator[Looks]:
    """Looks at a mount whose cache is a file system of so many bytes."""
    with tmpfs(tmp_path / "cache", size) as cache:
        cache.chmod(0o755)
        with mounted(store, tmp_path, *NO_MARGIN) as mount:
            yield Looks(mount, store)


def fill(directory: Path) -> Path:
    """Take all that is free on a file system; the file that has it."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return filler


def sync_files(cache: Path) -> int:
    """Sync the blobs; how many could not be."""
    failed = 0
    for path in blob_files(cache):
        with path.open("rb") as file:
            try:
                os.fdatasync(file.fileno())
            except OSError:
                failed += 1
    return failed


def drop_memory(cache: Path) -> None:
    """Have the kernel read blobs from the disk again, where it can."""
    for path in blob_files(cache) if cache.exists() else []:
        with contextlib.suppress(OSError), path.open("rb") as file:
            with contextlib.suppress(OSError):
                os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# No room


def test_a_disk_that_others_fill_costs_no_reader_anything(store: Path, tmp_path: Path, survived: Survived) -> None:
    with tmpfs(tmp_path / "cache", 4 * WHOLE) as cache:
        cache.chmod(0o755)
        with mounted(store, tmp_path, *NO_MARGIN) as mount:
            looks = Looks(mount, store)
            looks.read("model-0/part-0", "model-0/part-1")
            filler = fill(cache)
            looks.read()
            kill(mount)
            looks.read()
            filler.unlink()
            recovery_s = looks.until_kept("model-3/part-0")
            looks.read()
            assert restarts(mount) == 1
            looks.check(survived, "disk of the cache filled by others", injected=2, recovery_s=recovery_s)
        with mounted(store, tmp_path, *NO_MARGIN):
            pass
        assert disagreements(cache) == []


@slow
def test_a_full_disk_makes_room_of_what_is_not_in_use(store: Path, tmp_path: Path) -> None:
    with cached_in_memory(4 * WHOLE, store, tmp_path) as looks:
        looks.read("model-0/part-0")
        fill(looks.mount.cache)
        looks.until_kept("model-1/part-1")
        assert looks.mount.info("model-0/part-0")["residency"]["disk"] == 0


@slow
def test_a_file_system_without_inodes_costs_no_reader_anything(store: Path, tmp_path: Path, survived: Survived) -> None:
    with cached_in_memory(8 * WHOLE, store, tmp_path) as looks:
        looks.read("model-0/part-0")
        status = os.statvfs(looks.mount.cache)
        remount = ["mount", str(looks.mount.cache), "-o"]
        subprocess.run([*remount, f"remount,nr_inodes={status.f_files - status.f_ffree}"], check=True, timeout=20)
        looks.read()
        looks.read()
        subprocess.run([*remount, "remount,nr_inodes=10000"], check=True, timeout=20)
        recovery_s = looks.until_kept("model-3/part-0")
        looks.check(survived, "file system of the cache without inodes", recovery_s=recovery_s)


# A disk that fails


FAILURES: dict[str, Callable[[Image], None]] = {"stopped": Image.power_off, "read-only": Image.fail}


@pytest.mark.parametrize(
    ("image", "failure"),
    [
        (("xfs", "loop"), "stopped"),
        pytest.param(("ext4", "loop"), "stopped", marks=slow),
        pytest.param(("ext4", "loop,errors=remount-ro"), "read-only", marks=slow),
    ],
    indirect=["image"],
)
def test_a_disk_that_fails_is_done_without(
    image: Image, failure: str, store: Path, tmp_path: Path, survived: Survived
) -> None:
    with cached_on(image, store, tmp_path) as looks:
        looks.read("model-0/part-0", "model-0/part-1")
        mount = looks.mount
        serving(mount)
        FAILURES[failure](image)
        recovery_s = looks.until_all_can_be_read()
        kill(mount)
        assert looks.read() == 0
        assert trimsfs("pin", mount.path / "model-0/part-0").returncode == 9
        assert "cache       not used: " in trimsfs("status", mount.path).stdout
        fault = f"disk of the cache {failure} ({image.kind})"
        looks.check(survived, fault, injected=2, allowed={"EIO"}, recovery_s=recovery_s)
    image.restart()
    with cached_on(image, store, tmp_path) as looks:
        assert looks.read() == 0
    assert disagreements(looks.mount.cache) == []


@slow
@pytest.mark.parametrize("image", [("xfs", "loop"), ("ext4", "loop")], indirect=True)
def test_writes_that_fail_leave_no_wrong_byte(image: Image, store: Path, tmp_path: Path, survived: Survived) -> None:
    """The disk has no room for what the file system believes to have: all is well until it is read from the disk."""
    with tmpfs(tmp_path / "disk", 200 << 20) as disk:
        image.move_to(disk)
        with cached_on(image, store, tmp_path) as looks:
            mount = looks.mount
            looks.read("model-0/part-0")
            drop_memory(mount.cache)
            filler = fill(disk)
            # What is open now is read by the kernel, from the disk in the end: whoever opens it anew must not be.
            with (mount.path / "model-1/part-0").open("rb"):
                looks.read()
                lost = len(list(store.rglob("part-*"))) - len(list((store / "model-0").glob("part-*")))
                # Until the syncs have failed, nobody knows that these are lost.
                wait_until(lambda: mount.log().count("cannot sync its chunks to the disk") >= lost)
                drop_memory(mount.cache)
                looks.read()
                kill(mount)
                drop_memory(mount.cache)
                looks.read()
            filler.unlink()
            recovery_s = looks.until_all_can_be_read()
            drop_memory(mount.cache)
            looks.read()
            looks.check(survived, f"writes to the disk fail ({image.kind})", allowed={"EIO"}, recovery_s=recovery_s)
        image.restart()
        with cached_on(image, store, tmp_path) as looks:
            assert looks.read() == 0
            looks.until_kept("model-3/part-0")
        assert disagreements(mount.cache) == []


@pytest.mark.parametrize("image", [("xfs", "loop"), pytest.param(("ext4", "loop"), marks=slow)], indirect=True)
def test_what_a_server_wrote_before_it_was_killed_is_compared_with_the_disk(
    image: Image, store: Path, tmp_path: Path, survived: Survived
) -> None:
    """The kernel tells of a failed write once: the killed server may have got the error, and told nobody."""
    with tmpfs(tmp_path / "disk", 200 << 20) as disk:
        image.move_to(disk)
        with cached_on(image, store, tmp_path) as looks:
            mount, filler = looks.mount, fill(disk)
            looks.read("model-1/part-0", "model-1/part-1")
            os.kill(keeper(mount)["server_pid"], signal.SIGSTOP)
            errors = sync_files(mount.cache)
            kill(mount)
            looks.read("model-1/part-0")
            drop_memory(mount.cache)
            looks.read("model-1/part-0", "model-1/part-1")
            filler.unlink()
            recovery_s = looks.until_all_can_be_read()
            drop_memory(mount.cache)
            looks.read()
            fault = f"writes fail before the server is killed ({image.kind})"
            looks.check(survived, fault, injected=errors, allowed={"EIO"}, recovery_s=recovery_s)


def make_index_a_directory(cache: Path) -> None:
    remove_index(cache)
    (cache / "index.sqlite").mkdir()


def remove_index(cache: Path) -> None:
    for path in cache.glob("index.sqlite*"):
        path.unlink()


TROUBLES: dict[str, tuple[Callable[[Image], None], Callable[[Image], None]]] = {
    "stopped": (Image.power_off, Image.restart),
    "read-only": (lambda image: image.remount("ro"), lambda image: image.remount("rw")),
    "index-is-a-directory": (
        lambda image: make_index_a_directory(image.mountpoint / "cache"),
        lambda image: (image.mountpoint / "cache/index.sqlite").rmdir(),
    ),
}
"""What makes a cache unusable, and what undoes it."""


@pytest.mark.parametrize(
    "trouble", [pytest.param("stopped", marks=slow), pytest.param("read-only", marks=slow), "index-is-a-directory"]
)
def test_a_cache_that_cannot_be_used_at_the_start_is_told(
    trouble: str, image: Image, store: Path, tmp_path: Path
) -> None:
    cache, (make, undo) = image.mountpoint / "cache", TROUBLES[trouble]
    with cached_on(image, store, tmp_path) as looks:
        looks.read("model-0/part-0")
    make(image)
    done = trimsfs("mount", looks.mount.path, "--store", store, "--cache-dir", cache, "--log-file", tmp_path / "log")
    assert done.returncode == 9, done.stderr
    assert str(cache) in done.stderr
    undo(image)
    with cached_on(image, store, tmp_path) as looks:
        assert looks.read() == 0


@pytest.mark.alone  # whoever calls sync(2) waits meanwhile
def test_a_frozen_disk_holds_up_only_what_has_to_be_written(
    image: Image, store: Path, tmp_path: Path, survived: Survived
) -> None:
    with cached_on(image, store, tmp_path) as looks:
        looks.read("model-0/part-0", "model-0/part-1")
        mount = looks.mount
        serving(mount)
        image.freeze()
        thawing = threading.Timer(FROZEN_S, image.thaw)  # else who waits for the disk would wait for ever
        thawing.start()
        try:
            reader = subprocess.Popen(["cat", mount.path / "model-1/part-0"], stdout=subprocess.PIPE)
            time.sleep(2)
            looks.read("model-0/part-0", "model-0/part-1")
            assert len(os.listdir(mount.path / "model-2")) == len(SIZES)
            assert reader.poll() is None
            assert thawing.is_alive()  # all that came while the disk was frozen
        finally:
            thawing.cancel()
            thawing.join()
            with contextlib.suppress(OSError):  # it has been thawed
                image.thaw()
        began = time.monotonic()
        content, _ = reader.communicate(timeout=30)
        recovery_s = time.monotonic() - began
        assert content == (store / "model-1/part-0").read_bytes()
        looks.read()
        assert restarts(mount) == 0
        looks.check(survived, "disk of the cache frozen for 2 s", recovery_s=recovery_s)


# Somebody has been at the cache


def flip(path: Path, draw: random.Random, count: int = 8) -> None:
    size = path.stat().st_size
    for _ in range(count if size else 0):
        flip_byte(path, draw.randrange(size))


def each_blob(do: Callable[[Path, random.Random], None]) -> Callable[[Path, random.Random], None]:
    """Do something to some of the blobs, one at least."""

    def damage(cache: Path, draw: random.Random) -> None:
        paths = [path for path in blob_files(cache) if path.stat().st_size > 1000]
        for path in draw.sample(paths, max(1, len(paths) // 2)):
            do(path, draw)

    return damage


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "blobs removed": each_blob(lambda path, _draw: path.unlink()),
    "blobs cut off": each_blob(lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size))),
    "blobs emptied": each_blob(lambda path, _draw: os.truncate(path, 0)),
    "index flipped": lambda cache, draw: flip(cache / "index.sqlite", draw),
    "log of the index flipped": lambda cache, draw: flip(cache / "index.sqlite-wal", draw),
    "log of the index cut off": lambda cache, draw: os.truncate(cache / "index.sqlite-wal", draw.randrange(10_000)),
    "memory of the index cut off": lambda cache, _draw: os.truncate(cache / "index.sqlite-shm", 0),
    "index cut off": lambda cache, draw: os.truncate(cache / "index.sqlite", draw.randrange(20_000)),
    "index removed": lambda cache, _draw: remove_index(cache),
    "index made a directory": lambda cache, _draw: make_index_a_directory(cache),
    "all removed": lambda cache, _draw: shutil.rmtree(cache),
}
QUICK = {"blobs cut off"}


@pytest.mark.parametrize("option", ["passthrough=yes", pytest.param("passthrough=no", marks=slow)])
@pytest.mark.parametrize("damage", [pytest.param(name, marks=() if name in QUICK else slow) for name in DAMAGES])
def test_damage_while_mounted_gives_no_wrong_byte_and_passes(
    damage: str, option: str, store: Path, tmp_path: Path, survived: Survived
) -> None:
    draw = random.Random(f"{damage} {option}")
    with mounted(store, tmp_path, *NO_MARGIN, option) as mount:
        looks = Looks(mount, store)
        assert trimsfs("warm", mount.path / "model-0", mount.path / "model-1").returncode == 0
        serving(mount)
        DAMAGES[damage](mount.cache, draw)
        looks.read()
        drop_memory(mount.cache)
        looks.read()
        if damage != "all removed":  # else it ends by itself
            kill(mount)
        recovery_s = looks.until_all_can_be_read()
        if damage == "index made a directory":
            (mount.cache / "index.sqlite").rmdir()
        recovery_s += looks.until_kept("model-3/part-0")
        drop_memory(mount.cache)
        assert looks.read() == 0
        looks.check(survived, f"{damage} while mounted ({option})", injected=2, recovery_s=recovery_s)
    with mounted(store, tmp_path, *NO_MARGIN, option) as mount:
        assert Looks(mount, store).read() == 0
    assert disagreements(mount.cache) == []


ALONE = [name for name in DAMAGES if "log of" not in name and "memory of" not in name and "directory" not in name]


@slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("damage", [*ALONE, "blobs flipped"])
def test_damage_while_not_mounted_is_found_by_the_next_mount(
    damage: str, seed: int, store: Path, tmp_path: Path, survived: Survived
) -> None:
    draw = random.Random(f"{damage} {seed}")
    with mounted(store, tmp_path, *NO_MARGIN) as mount:
        assert trimsfs("warm", mount.path).returncode == 0
    (DAMAGES | {"blobs flipped": each_blob(flip)})[damage](mount.cache, draw)
    with mounted(store, tmp_path, *NO_MARGIN) as mount:
        looks = Looks(mount, store)
        assert looks.read() == 0
        recovery_s = looks.until_kept("model-3/part-0")
        looks.check(survived, f"{damage} while not mounted", recovery_s=recovery_s)
    assert disagreements(mount.cache) == []


# The host is short of something


@slow
def test_more_files_are_open_than_a_server_has_descriptors(
    store_directory: Path, tmp_path: Path, survived: Survived
) -> None:
    for number in range(150):
        (store_directory / f"part-{number}").write_bytes(random.Random(number).randbytes(10_000))
    with (
        mounted(store_directory, tmp_path, *NO_MARGIN, before=("prlimit", "--nofile=128:128")) as mount,
        contextlib.ExitStack() as held,
    ):
        looks = Looks(mount, store_directory)
        names = [f"part-{number}" for number in range(150)]
        files = [held.enter_context((mount.path / name).open("rb", buffering=0)) for name in names]
        looks.read()
        for name, file in zip(names, files, strict=True):
            assert os.pread(file.fileno(), 10_000, 0) == (store_directory / name).read_bytes()
        held.close()
        recovery_s = looks.until_kept("part-149")
        assert restarts(mount) == 0
        looks.check(survived, "150 files open with 128 descriptors", injected=150, recovery_s=recovery_s)


@slow
def test_a_server_without_memory_pins_what_its_group_allows(
    store_directory: Path, tmp_path: Path, survived: Survived
) -> None:
    """Locking more than that would have the kernel kill one server after the other, until the mount is given up."""
    for number in range(8):
        (store_directory / f"part-{number}").write_bytes(random.Random(number).randbytes(64 << 20))
    with memory_group(300 << 20) as group:
        inside = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group))
        with mounted(store_directory, tmp_path, *NO_MARGIN, "--server-user", "root", before=inside) as mount:
            looks = Looks(mount, store_directory)
            for number in range(8):
                assert trimsfs("pin", "--best-effort", mount.path / f"part-{number}").returncode == 0
            looks.read()
            kill(mount)  # the next one locks what is pinned again
            looks.read()
            assert restarts(mount) == 1
            looks.check(survived, "pins of 512 MiB by a server that may hold 300", injected=8)
        wait_until(lambda: group.read_text() == "")
