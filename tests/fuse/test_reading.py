"""Files read through a real mount."""

import errno
import hashlib
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.services.fast import start_fast
from tests.support.mounts import MountedStore, OwnDirectory, mounted, trimsfs, wait_until
from tests.support.processes import run

MIB, PAGE = 1 << 20, 4096


def read_as_another_user(path: Path) -> "subprocess.CompletedProcess[bytes]":
    command = ["setpriv", "--reuid=12345", "--regid=12345", "--clear-groups", "cat", str(path)]
    return subprocess.run(command, capture_output=True, check=False)


def test_files_and_directories_appear_as_they_are(own_directory: OwnDirectory) -> None:
    (own_directory.store / "resnet50").mkdir()
    (own_directory.store / "resnet50/params").write_bytes(b"weights")
    (own_directory.store / "single file").write_bytes(b"")

    assert sorted(os.listdir(own_directory.path)) == ["resnet50", "single file"]
    assert (own_directory.path / "resnet50/params").read_bytes() == b"weights"
    assert (own_directory.path / "single file").read_bytes() == b""
    source, shown = ((root / "resnet50/params").stat() for root in (own_directory.store, own_directory.path))
    assert (shown.st_size, shown.st_mtime_ns) == (7, source.st_mtime_ns)
    assert shown.st_mode & 0o777 == 0o444
    assert (own_directory.path / "resnet50").stat().st_mode & 0o777 == 0o555
    with pytest.raises(FileNotFoundError):
        (own_directory.path / "resnet50/absent").stat()


def test_random_reads_are_byte_exact_cold_and_warm(store_directory: Path, streaming_mount: MountedStore) -> None:
    draw = random.Random(3)
    content = draw.randbytes(20 * MIB + 123)
    (store_directory / "model").write_bytes(content)
    path = streaming_mount.path / "model"

    for passed_through in (False, True):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            assert streaming_mount.info("model")["passthrough"] == passed_through
            for _ in range(200):
                offset, size = draw.randrange(len(content) + 10), draw.randrange(300_000)
                assert os.pread(descriptor, size, offset) == content[offset : offset + size]
        finally:
            os.close(descriptor)
        assert trimsfs("warm", path).returncode == 0


def test_cold_mapping_faulted_by_64_threads_does_not_hang(store_directory: Path, streaming_mount: MountedStore) -> None:
    content = random.Random(5).randbytes(64 * MIB)
    (store_directory / "model").write_bytes(content)
    program = Path(__file__).parents[1] / "support/fault_threads.py"

    done = run(sys.executable, program, "64", streaming_mount.path / "model")

    assert done.returncode == 0, done.stderr
    assert streaming_mount.metrics()["trimsfs_files_cached_opens_total"] == 1
    assert done.stdout.strip() == hashlib.sha256(content).hexdigest()


def test_other_users_read_what_root_mounted(own_directory: OwnDirectory) -> None:
    (own_directory.store / "model").write_bytes(b"weights")

    done = read_as_another_user(own_directory.path / "model")

    assert (done.returncode, done.stdout) == (0, b"weights")


def test_no_allow_other_keeps_other_users_out(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(b"weights")
    with mounted(store_directory, tmp_path, "--no-allow-other") as mount:
        done = read_as_another_user(mount.path / "model")

    assert done.returncode == 1
    assert b"Permission denied" in done.stderr


def test_owner_group_and_mode_are_as_told(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(b"weights")
    with mounted(store_directory, tmp_path, "--uid", "1234", "--gid", "4321", "--mode", "0640") as mount:
        status = (mount.path / "model").stat()
        directory = mount.path.stat()
        done = read_as_another_user(mount.path / "model")

    assert (status.st_uid, status.st_gid, status.st_mode & 0o777) == (1234, 4321, 0o440)
    assert directory.st_mode & 0o777 == 0o550
    assert b"Permission denied" in done.stderr


def test_everything_that_would_write_is_refused_as_on_a_read_only_file_system(own_directory: OwnDirectory) -> None:
    (own_directory.store / "model").write_bytes(b"weights")
    (own_directory.store / "folder").mkdir()
    model, folder = own_directory.path / "model", own_directory.path / "folder"
    attempts: dict[str, Callable[[], object]] = {
        "create": (own_directory.path / "new").touch,
        "write": lambda: model.open("r+b"),
        "append": lambda: model.open("ab"),
        "truncate": lambda: os.truncate(model, 0),
        "unlink": model.unlink,
        "rename": lambda: model.rename(own_directory.path / "other"),
        "mkdir": (own_directory.path / "new").mkdir,
        "rmdir": folder.rmdir,
        "chmod": lambda: model.chmod(0o777),
        "chown": lambda: os.chown(model, 1, 1),
        "utime": lambda: os.utime(model),
        "link": lambda: os.link(model, own_directory.path / "new"),
        "symlink": lambda: os.symlink("model", own_directory.path / "new"),
        "setxattr": lambda: os.setxattr(model, "user.other", b"x"),
        "setxattr of ours": lambda: os.setxattr(model, "user.trims.pinned", b"true"),
        "removexattr": lambda: os.removexattr(model, "user.trims.pinned"),
    }
    for name, attempt in attempts.items():
        with pytest.raises(OSError, match="Read-only file system") as caught:
            attempt()
        assert caught.value.errno == errno.EROFS, name
    with pytest.raises(OSError, match="Invalid cross-device link"):
        model.rename(own_directory.store / "other")
    with model.open("rb") as file, pytest.raises(PermissionError):
        mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    assert model.read_bytes() == b"weights"


def test_handle_goes_on_with_its_generation_when_its_bytes_are_here(own_directory: OwnDirectory) -> None:
    old, new = (random.Random(seed).randbytes(12 * MIB) for seed in (8, 9))
    (own_directory.store / "model").write_bytes(old)
    with (own_directory.path / "model").open("rb", buffering=0) as file:
        assert file.read(4) == old[:4]
        wait_until(lambda: own_directory.mount.info(f"{own_directory.path.name}/model")["verified"], timeout_s=60)
        (own_directory.store / "new").write_bytes(new)
        (own_directory.store / "new").replace(own_directory.store / "model")
        time.sleep(0.3)
        assert (own_directory.path / "model").read_bytes() == new
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        assert file.read(len(old)) == old


def test_page_cache_is_kept_from_one_open_to_the_next(own_directory: OwnDirectory) -> None:
    (own_directory.store / "model").write_bytes(bytes(MIB))
    path = own_directory.path / "model"
    path.read_bytes()
    reads = own_directory.mount.metrics()["trimsfs_files_reads_total"]
    for _ in range(10):
        path.read_bytes()
    assert own_directory.mount.metrics()["trimsfs_files_reads_total"] == reads


def test_streaming_open_fetches_nothing_before_the_first_read(
    store_directory: Path, streaming_mount: MountedStore
) -> None:
    (store_directory / "model").write_bytes(random.Random(10).randbytes(40 * MIB))

    def fetched() -> float:
        return streaming_mount.metrics()["trimsfs_fetch_fetched_bytes_total"]

    with (streaming_mount.path / "model").open("rb", buffering=0) as file:
        time.sleep(0.3)
        assert fetched() == 0
        file.read(1)
        wait_until(lambda: fetched() == 40 * MIB)


def test_a_big_file_that_is_read_at_random_is_fetched_by_what_is_read(store_directory: Path, tmp_path: Path) -> None:
    draw, pages = random.Random(11), (4 << 30) // PAGE
    where = draw.sample(range(pages), 220)
    contents = {page: draw.randbytes(PAGE) for page in where}
    bucket = store_directory / "bucket"
    bucket.mkdir()
    with (bucket / "big").open("wb") as file:
        file.truncate(pages * PAGE)
        for page, content in contents.items():
            file.seek(page * PAGE)
            file.write(content)
    with (
        start_fast(store_directory) as server,
        mounted("s3://bucket", tmp_path, environment=server.environment()) as mount,
    ):
        descriptor = os.open(mount.path / "big", os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
            for page in where[:20]:
                assert os.pread(descriptor, PAGE, page * PAGE) == contents[page]
            wait_until(lambda: not mount.metrics()["trimsfs_fetch_in_flight"])
            assert server.statistics()["bucket/big"][1] <= 100 * MIB  # a chunk a read, until the pattern shows
            server.reset()
            for page in where[20:]:
                assert os.pread(descriptor, PAGE, page * PAGE) == contents[page]
        finally:
            os.close(descriptor)
        requests, fetched = server.statistics()["bucket/big"]
        assert len(where[20:]) // 2 <= requests <= len(where[20:])
        assert fetched <= 4 * PAGE * len(where[20:])
