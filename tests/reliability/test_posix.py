"""The same calls on a mount and on the directory that it shows, of a read-only ext4: what differs is in a list, and in
docs/semantics.md.

LTP, xfstests and pjdfstest cannot be had from a package: this stands in for what of them applies to a file system that
is only read.
"""

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reliability.calls import CASES, SIZES, Root
from tests.reliability.perform import MODULES
from tests.support.images import Image
from tests.support.mounts import let_in, mounted
from tests.support.survival import Survived
from tests.support.tmpfs import tmpfs
from tests.support.users import STRANGER

REPOSITORY = Path(__file__).parents[2]
SEMANTICS = REPOSITORY / "docs/semantics.md"
DIFFERENCES = {
    "attributes: links of a directory": "one link",
    "attributes: size of a directory": "no size",
    "attributes: statx": "no size",
    "attributes: blocks": "no holes",
    "read: holes of a sparse file": "no holes",
    "attributes: names": "`user.trims.*` attributes",
    "attributes: of nothing": "`user.trims.*` attributes",
    "directory: dots": "neither `.` nor `..`",
    "directory: positions": "neither `.` nor `..`",
    "descriptor: epoll": "can be polled",
    "descriptor: flags": "neither flags nor extents",
    "descriptor: extents": "neither flags nor extents",
}
"""The cases that come out differently, and how docs/semantics.md says so."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What all programs look at: a directory of an ext4 that is read-only in the end."""
    image = Image("ext4", tmp_path_factory.mktemp("posix"), size=64 << 20)
    image.mount()
    try:
        fill(image.mountpoint / "root")
        let_in(image.mountpoint)
        image.remount("ro,nosuid,nodev,noatime")
        yield image.mountpoint / "root"
    finally:
        image.remove()


def fill(store: Path) -> None:
    """Make what is looked at. Nobody may write to it, but root."""
    for name in ("dir", "many", "empty-dir"):
        (store / name).mkdir(parents=True)
    for name, size in SIZES.items():
        (store / name).write_bytes(random.Random(name).randbytes(size))
    for number in range(300):
        (store / f"many/entry-{number:03}").touch()
    (store / ("n" * 255)).write_bytes(b"long")
    with (store / "sparse").open("wb") as file:
        file.seek(1 << 20)
        file.write(b"data" * 1000)
        file.truncate(3 << 20)
    for path in store.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    store.chmod(0o555)


def performed(root: Root) -> dict[int, dict[str, str]]:
    """What every case comes to, for root and for another user."""
    found = {}
    for user in (0, STRANGER):
        command = [sys.executable, "-m", "tests.reliability.perform", root.path, root.scratch, str(user)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr
        found[user] = json.loads(done.stdout)
    return found


def roots(path: Path, scratch: Path) -> Root:
    """Where programs run, with links from elsewhere."""
    scratch.mkdir()
    scratch.chmod(0o777)
    (scratch / "mine").touch()
    (scratch / "link").symlink_to(path / "dir/file")
    (scratch / "loop").symlink_to("loop")
    (scratch / "chain-0").symlink_to(path / "dir")
    for number in range(50):
        (scratch / f"chain-{number + 1}").symlink_to(f"chain-{number}")
    return Root(str(path), str(scratch))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of another type, to write to."""
    with tmpfs(tmp_path_factory.mktemp("scratch"), 64 << 20) as directory:
        directory.chmod(0o777)
        yield directory


@pytest.fixture(scope="module")
def expected(store: Path, scratch: Path) -> dict[int, dict[str, str]]:
    """What every case comes to there, for root and for another user."""
    return performed(roots(store, scratch / "native"))


MODES = [
    pytest.param(("passthrough=yes",), id="passthrough"),
    pytest.param(("passthrough=no",), id="cached", marks=pytest.mark.slow),
    pytest.param(("passthrough=no", "--cold-open", "stream"), id="stream", marks=pytest.mark.slow),
    pytest.param(("--cache-size", "1MiB"), id="uncached", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", MODES)
def test_calls_come_to_the_same_as_on_a_local_file_system(
    options: tuple[str, ...],
    store: Path,
    scratch: Path,
    expected: dict[int, dict[str, str]],
    tmp_path: Path,
    survived: Survived,
) -> None:
    """For root and for another user, but for what is in the list."""
    directory = tmp_path / "root"
    with mounted(store, tmp_path / "mount", *options) as mount:
        directory.mkdir()
        subprocess.run(["mount", "--bind", mount.path, directory], check=True)
        try:
            found = performed(roots(directory, scratch / "-".join(("mount", *options))))
        finally:
            subprocess.run(["umount", directory], check=True)
    different = {
        (user, name): (expected[user][name], found[user][name])
        for user in found
        for name in CASES
        if expected[user][name] != found[user][name]
    }
    unforeseen = {key: values for key, values in different.items() if key[1] not in DIFFERENCES}
    assert unforeseen == {}
    assert {name for user, name in different if user == 0} == set(DIFFERENCES)
    assert not [text for one in (*found.values(), *expected.values()) for text in one.values() if "Traceback" in text]
    survived(
        f"calls as on a local file system, {' '.join(options)}",
        injected=len(CASES),
        operations=2 * len(CASES),
        errors=Counter({"documented": len(different)}),
        allowed=["documented"],
    )


def test_every_difference_is_documented() -> None:
    text = " ".join(SEMANTICS.read_text().split())
    assert [said for said in DIFFERENCES.values() if said not in text] == []
    assert set(DIFFERENCES) <= set(CASES)
    assert len(CASES) > 180
    assert len(MODULES) == 3
