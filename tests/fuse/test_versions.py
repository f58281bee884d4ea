"""Versions on a real mount: each process sees one version of a model through an alias, whole."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.keepers import kill
from tests.support.mounts import MountedStore, OwnDirectory, mounted, trimsfs, umount
from tests.support.versions import Put, in_directory, move, publish, remove, write_files

SHARDS = 10
SHARD = 4096
SEEN_S = 1.0
"""How long after an alias has moved a new process may still see its last target."""

LOADER = """
import os, sys, time
alias, loads = sys.argv[1], int(sys.argv[2])
done, met = 0, set()
while done < loads or (len(met) < 2 and done < 20 * loads):
    if os.fork() == 0:
        seen = set()
        for number in range(10):
            with open(f"{alias}/shard-{number}", "rb") as shard:
                seen.update(shard.read())
            time.sleep(0.003)
        print("".join(sorted(map(chr, seen))), flush=True)
        os._exit(max(seen))
    met.add(os.waitstatus_to_exitcode(os.wait()[1]))
    done += 1
"""
"""Loads ten shards, each time in a new process; prints the versions of each load. It follows no alias itself.

It goes on until both versions were met: the mount asks for the alias twice a second, so few loads may all meet one.
"""

READER = """
import os, sys, threading
shown = print
for line in sys.stdin:
    how, path = line.split()
    if how == "thread":
        thread = threading.Thread(target=lambda: shown(open(path).read()[0], flush=True))
        thread.start()
        thread.join()
    elif how == "child":
        os.system(f"head -c1 {path}; echo")
    elif how == "fork":
        if os.fork() == 0:
            shown(open(path).read()[0], flush=True)
            os._exit(0)
        os.wait()
    else:
        shown(open(path).read()[0], flush=True)
"""
"""Prints the first byte of each file that it is told to read: by itself, in a thread, a fork, or a program."""


def shards(version: str) -> dict[str, bytes]:
    """The files of a version, each full of the last character of its name."""
    return {f"shard-{number}": version[-1].encode() * SHARD for number in range(SHARDS)}


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mount that believes names for longer than any test takes."""
    directory = tmp_path_factory.mktemp("versions")
    (directory / "store").mkdir()
    (directory / "store/readme").write_text("models")
    with mounted(directory / "store", directory, "--metadata-ttl", "600") as mount:
        yield mount


@pytest.fixture
def put(mount: MountedStore) -> Put:
    return in_directory(mount.path.parent / "store")


@pytest.fixture
def model(mount: MountedStore, put: Put, request: pytest.FixtureRequest) -> OwnDirectory:
    """A model of the test's own with two versions; its alias ``prod`` leads to the first."""
    name = f"model-{abs(hash(request.node.name)):x}"
    for version in ("v1", "v2"):
        publish(put, name, version, shards(version))
    move(put, name, "prod", "v1")
    assert trimsfs("refresh", mount.path).returncode == 0
    return OwnDirectory(mount.path.parent / "store" / name, mount.path / name, mount)


class Reader:
    """A process that reads on command."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def read(self, path: Path, how: str = "itself") -> str:
        """The first byte of a file."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{how} {path}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def reader() -> Iterator[Reader]:
    found = Reader()
    try:
        yield found
    finally:
        found.close()


def seen(path: Path) -> str:
    """The first byte of a file for a new process; this one must follow no alias, as what it starts would see its."""
    done = subprocess.run(["head", "-c1", path], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout or done.stderr


def names(directory: Path) -> list[str]:
    done = subprocess.run(["ls", "-A", directory], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.split()


@contextmanager
def flipping(put: Put, name: str) -> Iterator[Counter[str]]:
    """Move the alias to and fro all the time."""
    ended, moves = threading.Event(), Counter[str]()

    def run() -> None:
        while not ended.wait(0.02):
            version = "v2" if sum(moves.values()) % 2 == 0 else "v1"
            move(put, name, "prod", version)
            moves[version] += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield moves
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("loads", [50, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_a_load_through_an_alias_that_moves_is_of_one_version(loads: int, model: OwnDirectory, put: Put) -> None:
    with flipping(put, model.path.name) as moves:
        done = subprocess.run(
            [sys.executable, "-c", LOADER, model.path / "prod", str(loads)],
            capture_output=True,
            text=True,
            timeout=600,
            check=True,
        )
    counts = Counter(done.stdout.split())
    print(f"{loads} loads while the alias moved {sum(moves.values())} times: {dict(counts)}")
    assert counts.keys() == {"1", "2"}, "each load is of one version, and both were seen"
    assert sum(counts.values()) >= loads


def test_a_new_process_sees_a_move_within_a_second_and_what_runs_does_not(model: OwnDirectory, put: Put) -> None:
    path = model.path / "prod/shard-0"
    with reader() as before:
        assert [seen(path), before.read(path)] == ["1", "1"]
        move(put, model.path.name, "prod", "v2")
        time.sleep(SEEN_S)
        assert seen(path) == "2"
        for how in ("itself", "thread", "fork", "child"):
            assert before.read(model.path / "prod/shard-1", how) == "1", how
        with reader() as after:
            assert after.read(path) == "2"
            move(put, model.path.name, "prod", "v1")  # a rollback is another move
            time.sleep(SEEN_S)
            assert [seen(path), after.read(path), after.read(path, "child")] == ["1", "2", "2"]


def test_a_version_published_after_the_listing_is_there_as_soon_as_its_alias(model: OwnDirectory, put: Put) -> None:
    assert names(model.path) == ["prod", "v1", "v2"]
    publish(put, model.path.name, "v3", shards("v3"))
    move(put, model.path.name, "prod", "v3")
    time.sleep(SEEN_S)
    assert seen(model.path / "prod/shard-9") == "3"


def test_a_push_that_was_killed_shows_nothing_until_another_has_ended_it(model: OwnDirectory, put: Put) -> None:
    files = shards("v3")
    for count in range(SHARDS + 1):
        write_files(put, model.path.name, "v3", dict(list(files.items())[:count]))
        assert "No such file" in seen(model.path / "v3/shard-0"), f"after {count} files"
    assert trimsfs("refresh", model.path).returncode == 0
    assert names(model.path) == ["prod", "v1", "v2"]
    publish(put, model.path.name, "v3", files)
    assert trimsfs("refresh", model.path).returncode == 0
    assert names(model.path) == ["prod", "v1", "v2", "v3"]
    assert seen(model.path / "v3/shard-0") == "3"


def test_what_describes_versions_is_hidden_and_an_alias_is_a_link(model: OwnDirectory) -> None:
    assert "No such file" in seen(model.path / ".trims-versions/v1.json")
    done = subprocess.run(["readlink", model.path / "prod"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "v1\n"
    done = subprocess.run(["find", model.path, "-type", "l"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [str(model.path / "prod")]


def test_a_removed_version_is_not_found_and_what_is_open_goes_on(model: OwnDirectory, put: Put) -> None:
    with (model.path / "v1/shard-0").open("rb") as before:
        remove(put, model.path.name, "v1")
        assert trimsfs("refresh", model.path).returncode == 0
        assert names(model.path) == ["prod", "v2"]
        assert "No such file" in seen(model.path / "v1/shard-0")
        assert before.read() == b"1" * SHARD


def test_a_file_of_a_version_is_compared_with_the_manifest(model: OwnDirectory) -> None:
    (model.store / "v1/shard-2").write_bytes(b"X" * SHARD)  # a version never changes: somebody has written over it
    assert seen(model.path / "v1/shard-0") == "1"
    assert "Input/output error" in seen(model.path / "v1/shard-2")
    assert f"{model.path.name}/v1/shard-2: digest mismatch, expected sha256:" in model.mount.log()
    problem = os.getxattr(model.path / "v1/shard-2", "user.trims.problem").decode()
    assert "digest mismatch: " in problem
    assert problem.endswith("; then `trimsfs refresh`")
    done = trimsfs("verify", model.path / "v1/shard-0")
    assert (done.returncode, "verified 1 file" in done.stdout) == (0, True)


def test_a_process_sees_its_version_also_after_the_server_was_replaced(
    mount: MountedStore, model: OwnDirectory, put: Put
) -> None:
    path = model.path / "prod/shard-0"
    with reader() as before:
        assert before.read(path) == "1"
        move(put, model.path.name, "prod", "v2")
        kill(mount)
        assert [seen(path), before.read(path), before.read(path, "child")] == ["2", "1", "1"]


def test_a_bind_mount_of_an_alias_keeps_its_version(model: OwnDirectory, put: Put, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    subprocess.run(["mount", "--bind", model.path / "prod", there], check=True, timeout=60)
    try:
        move(put, model.path.name, "prod", "v2")
        time.sleep(SEEN_S)
        assert [seen(there / "shard-0"), seen(model.path / "prod/shard-0")] == ["1", "2"]
    finally:
        umount(there)


def test_commands_follow_an_alias(model: OwnDirectory) -> None:
    assert trimsfs("warm", model.path / "prod").returncode == 0
    listed = json.loads(trimsfs("ls", "--json", model.path / "v1").stdout)
    assert [row["files"] for row in listed] == [SHARDS]
    assert listed[0]["disk"] == SHARDS * SHARD
