"""`trimsfs top` in a real terminal, on real mounts: what it shows, what its keys do, and that a mount that hangs does
not hold it up."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.services.fast import start_fast
from tests.support.keepers import hanging, serving
from tests.support.mounts import TRIMSFS, MountedStore, mounted, trimsfs, wait_until
from tests.support.processes import alive
from tests.support.terminal import Terminal, terminal

MIB = 1 << 20
RATE = 8 * MIB
"""Bytes a second of each connection: a chunk takes a second."""
SIZES = {"large/weights": 4 << 30, "small/weights": 3 * MIB, "middle/weights": 5 * MIB}


@pytest.fixture(scope="module")
def module_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mount of a slow store."""
    directory = tmp_path_factory.mktemp("top")
    for name, size in SIZES.items():
        path = directory / "buckets/bucket" / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.truncate(path, size)
    with start_fast(directory / "buckets", rate=RATE) as server:
        options = ("--digests", "off", "--prefetch", "off")
        with mounted("s3://bucket", directory / "mount", *options, environment=server.environment()) as mount:
            yield mount


@pytest.fixture
def mount(module_mount: MountedStore) -> Iterator[MountedStore]:
    """The mount, of which nothing is cached."""
    yield module_mount
    wait_until(lambda: module_mount.metrics()["trimsfs_fetch_in_flight"] == 0)
    trimsfs("unpin", module_mount.path)
    wait_until(lambda: trimsfs("evict", module_mount.path).returncode == 0)


@contextmanager
def shown(mount: MountedStore, *before: str, **size: int) -> Iterator[Terminal]:
    """A terminal in which `trimsfs top` runs."""
    with terminal([*before, TRIMSFS, "top", "--interval", "0.2", str(mount.path)], **size) as top:
        top.wait_for(f"{mount.path}: s3://bucket")
        yield top


@contextmanager
def reader(path: Path, *, whole: bool = True) -> Iterator[int]:
    """A process that has a file open, has read its first byte, or all of it, and goes on."""
    program = "import sys, time; f = open(sys.argv[1], 'rb', 0); print(len(f.read(int(sys.argv[2]))), flush=True); "
    command = [sys.executable, "-c", f"{program} time.sleep(600)", str(path), "-1" if whole else "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def models(top: Terminal) -> list[str]:
    """The names of the models on the screen, in their order."""
    return [Path(line.split()[0]).name for line in top.screen().splitlines() if line.startswith("/") and "%" in line]


def test_models_their_users_fetches_and_waits_are_shown(mount: MountedStore) -> None:
    with (
        shown(mount, columns=200 + len(str(mount.path))) as top,
        reader(mount.path / "small/weights", whole=False) as has,
        reader(mount.path / "large/weights") as waits,
    ):
        row = "3.1 MB  100%  100%     1 "
        assert top.wait_for(row).startswith(f"{mount.path}/small ")
        wait_until(lambda: str(has) in top.wait_for(row))
        assert "waits " in top.wait_for(f" {waits} for {mount.path}/large/weights: ")
        wait_until(lambda: "MB/s" in top.wait_for("  fetch "))
        wait_until(lambda: any(bar in top.wait_for(f"{mount.path}/large  ") for bar in "▁▂▃▄▅▆▇█"))


def test_keys_sort_pin_evict_and_end(mount: MountedStore) -> None:
    for name in SIZES:
        if not name.startswith("large"):
            (mount.path / name).read_bytes()
    (mount.path / "small/weights").read_bytes()
    with shown(mount) as top:
        top.wait_for(f"{mount.path}/small")
        top.press("n")
        top.wait_for("by name")
        by_name = models(top)
        top.press("s")
        top.wait_for("by size")
        by_size = models(top)
        assert by_name == sorted(by_name)
        assert [name for name in by_size if name != "large"] == ["middle", "small"]

        top.press("n")
        top.press(*["Down"] * len(by_name))
        assert by_name[-1] == "small"
        top.press("p")
        top.wait_for(f"pin --background {mount.path}/small: job ")
        wait_until(lambda: bool(mount.info("small/weights")["pinned"]))
        top.wait_for(" yes")
        top.press("e")
        top.wait_for(f"evict {mount.path}/small? y or n")
        top.press("y")
        top.wait_for("is pinned: unpin it first")
        top.press("p")
        top.wait_for("unpinned 1 file")
        top.press("e", "n")
        time.sleep(1)
        assert mount.info("small/weights")["residency"]["disk"] == SIZES["small/weights"]
        top.press("e", "y")
        top.wait_for("evicted 1 file")
        assert mount.info("small/weights")["residency"]["disk"] == 0

        top.press("q")
        top.wait_for("ended with 0")
        settings = top.screen()
        assert " icanon" in settings
        assert " echo " in settings


def test_a_signal_leaves_the_terminal_as_it_was(mount: MountedStore) -> None:
    with shown(mount) as top:
        top.press("C-c")
        assert "interrupted" in top.wait_for("interrupted")
        top.wait_for("ended with 130")
        assert " icanon" in top.screen()


def test_a_mount_that_hangs_holds_nothing_up(mount: MountedStore, tmp_path: Path) -> None:
    (mount.path / "middle/weights").read_bytes()
    with shown(mount) as top:
        top.wait_for(f"{mount.path}/middle")
        server = serving(mount)
        with hanging(mount):
            wait_until(lambda: int(re.findall(r"no answer for (\d+) s", top.wait_for("no answer for "))[0]) >= 4)
            top.press("s")
            top.wait_for("by size")
            assert "middle" in models(top), "what it told before is still there"
            top.press("q")
            top.wait_for("ended with 0")
    assert alive(server)


def test_a_small_terminal_shows_the_chosen_model(mount: MountedStore) -> None:
    (mount.path / "middle/weights").read_bytes()
    (mount.path / "small/weights").read_bytes()
    with shown(mount, columns=100, lines=10) as top:
        top.press("n")
        top.wait_for("by name")
        top.press(*["Down"] * 5)
        top.wait_for("  3.1 MB  ")
        assert "by name" in top.screen().splitlines()[0]
        assert top.screen().splitlines()[9].startswith("sort: n s d h o u f ")


def test_a_terminal_without_utf8_shows_what_it_can(mount: MountedStore) -> None:
    with shown(mount, "env", "PYTHONIOENCODING=iso-8859-1") as top, reader(mount.path / "large/weights"):
        wait_until(lambda: "?" in top.wait_for("  fetch "))


def test_in_a_pipe_all_is_told_once(mount: MountedStore) -> None:
    with reader(mount.path / "small/weights", whole=False) as pid:
        wait_until(lambda: mount.info("small/weights")["open"] == 1)
        done = trimsfs("top", mount.path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == f"{mount.path}: s3://bucket"
    headings = next(line.split() for line in lines if line.startswith("MODEL"))
    assert headings == ["MODEL", "SIZE", "DISK", "HOST", "OPEN", "USES", "PINNED", "FETCH", "USED", "BY"]
    (row,) = [line for line in lines if line.startswith(f"{mount.path}/small")]
    assert row.endswith(f" {pid}")
    assert "\x1b" not in done.stdout


def test_only_who_may_command_learns_who_waits_for_what(mount: MountedStore) -> None:
    with reader(mount.path / "large/weights") as pid:
        wait_until(lambda: bool(mount.control()["waits"]))
        waits = mount.control()["waits"]
        assert {(wait["thread"], wait["path"]) for wait in waits} <= {(pid, "large/weights")}
        command = ["cat", str(mount.path / ".trims/control")]
        told = subprocess.run(command, user=65534, capture_output=True, text=True, check=True)
        assert "waits" not in json.loads(told.stdout)
