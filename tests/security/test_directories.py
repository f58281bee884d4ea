"""A directory store in which somebody else may write: nothing from outside of it is ever shown."""

import errno
import os
import signal
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.contract.backends import read
from tests.support.mounts import mounted
from tests.support.survival import Survival, Survived
from tests.support.tmpfs import tmpfs
from trimsfs.errors import ObjectChangedError, ObjectNotFoundError, TransientStoreError
from trimsfs.stores import DirectoryStore
from trimsfs.types import SIZE_MAX, Generation

SECRET, HARMLESS = b"secret of another" * 100, b"weights of a model" * 100
ROUNDS = 1500


@contextmanager
def swapping(one: Path, other: Path) -> Iterator[None]:
    """Another process that exchanges two names without a pause."""
    spare = one.with_name(f"{one.name}-spare")
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                os.rename(one, spare)
                os.rename(other, one)
                os.rename(spare, other)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("component", ["file", "directory"])
async def test_nothing_from_outside_comes_while_links_are_exchanged(
    component: str, tmp_path: Path, survived: Survived
) -> None:
    """A component of the path is a link that leads out at one moment and none at the next."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory, content in ((root / "dir", HARMLESS), (outside, SECRET)):
        directory.mkdir(parents=True)
        (directory / "model").write_bytes(content)
    right, link = (root / "dir/model", root / "dir/link") if component == "file" else (root / "dir", root / "link")
    link.symlink_to(outside / "model" if component == "file" else outside)
    beyond = (outside / "model").stat()
    store = DirectoryStore(root)
    errors: Counter[str] = Counter()
    seen = wrong = 0
    with swapping(right, link):
        for _ in range(ROUNDS):
            try:
                page = await store.list_page("dir/")
                found = await store.stat("dir/model")
                # As if it had been there before: the size and the times are those of the file outside.
                lie = Generation(
                    key="dir/model", etag=_etag(beyond), size=beyond.st_size, modified_ns=beyond.st_mtime_ns
                )
                for generation in (*page.objects, found, lie):
                    wrong += generation is not lie and generation.etag == _etag(beyond)
                    wrong += await read(store, generation) != HARMLESS
                    seen += 1
            except (ObjectNotFoundError, ObjectChangedError, TransientStoreError) as error:
                errors[type(error).__name__] += 1
    await store.aclose()
    assert errors.total() > ROUNDS // 100
    survived(
        Survival(
            fault=f"links exchanged, {component}",
            injected=ROUNDS,
            operations=seen + errors.total(),
            errors=errors,
            allowed=["ObjectNotFoundError", "ObjectChangedError", "TransientStoreError"],
            wrong=wrong,
        )
    )


def _etag(status: os.stat_result) -> str:
    numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join(f"{number:x}" for number in numbers)


def test_what_the_server_may_not_read_is_not_read_by_another_name(store_directory: Path, tmp_path: Path) -> None:
    """Nor is anything served that is no file, and a file may tell any size and time."""
    outside = tmp_path / "outside"
    outside.write_bytes(SECRET)
    outside.chmod(0o600)
    with tmpfs(store_directory, 1 << 20):
        (store_directory / "model").write_bytes(HARMLESS)
        os.mkfifo(store_directory / "fifo")
        os.mknod(store_directory / "memory", 0o666 | stat.S_IFCHR, os.makedev(1, 1))
        os.mknod(store_directory / "zeros", 0o666 | stat.S_IFCHR, os.makedev(1, 5))
        os.mknod(store_directory / "disk", 0o666 | stat.S_IFBLK, os.makedev(7, 0))
        (store_directory / "link").symlink_to(outside)
        (store_directory / "fd").symlink_to("/proc/self/fd")
        (store_directory / "mine").write_bytes(SECRET)
        os.link(store_directory / "mine", store_directory / "hard")
        (store_directory / "hard").chmod(0o600)
        for name, size in (("sparse", SIZE_MAX), ("too-sparse", SIZE_MAX + 1)):
            (store_directory / name).touch()
            os.truncate(store_directory / name, size)
        for name, time_s in (("old", -(1 << 40)), ("new", 1 << 40)):
            (store_directory / name).write_bytes(HARMLESS)
            os.utime(store_directory / name, (time_s, time_s))
        with mounted(store_directory, tmp_path, "--cold-open", "stream", "--min-free", "0") as mount:
            for name in ("mine", "hard"):  # which tests let all read
                (store_directory / name).chmod(0o600)
            assert set(os.listdir(mount.path)) == {"model", "mine", "hard", "sparse", "old", "new"}
            for name in ("fifo", "memory", "zeros", "disk", "link", "fd", "fd/0", "too-sparse"):
                with pytest.raises(FileNotFoundError):
                    (mount.path / name).read_bytes()
            for name in ("mine", "hard"):
                with pytest.raises(OSError, match="Permission denied") as caught:
                    (mount.path / name).read_bytes()
                assert caught.value.errno == errno.EACCES
            for name in ("model", "old", "new"):
                assert (mount.path / name).read_bytes() == HARMLESS
            with (mount.path / "sparse").open("rb", buffering=0) as file:
                assert os.pread(file.fileno(), 10, SIZE_MAX - 5) == bytes(5)
            assert mount.metrics()["trimsfs_names_hidden_keys"] == 1
