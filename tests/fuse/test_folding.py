"""Folding on a real mount: what processes make of a model alike is shared, and nobody gets another's bytes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.support.mounts import MountedStore, mounted, wait_until
from trimsfs.client import pages
from trimsfs.extras.folding.folding import LEAST

NAME = "weights.safetensors"
SIZE = 24 << 20
USER, OTHER = 54321, 54322
CHILD = """
import ctypes, json, os, sys, zlib
import trimsfs

path, user, change = sys.argv[1:]
model = trimsfs.open(path)
(weights,) = map(model.raw, model.table.tensors)
os.setuid(int(user))
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # as with a program that the user has started: /proc/self is his
exec(change)
for line in sys.stdin:
    if line == "fold\\n":
        folded = model.fold()
        answer = {"shared": folded.shared, "passed_on": folded.passed_on, "own": folded.own}
    else:
        answer = {"crc": zlib.crc32(weights)}
    print(json.dumps(answer), flush=True)
"""
REVERSED = "weights[:] = weights.tobytes()[::-1]"


class Process:
    """A process of a user that has a model open and has written to it."""

    def __init__(self, stack: ExitStack, path: Path, change: str, user: int = USER) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, path, str(user), change],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(self._end)

    def _end(self) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, question: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{question}\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


pytestmark = pytest.mark.parametrize(
    "directory_mount", ["passthrough=yes", pytest.param("passthrough=no", marks=pytest.mark.slow)], indirect=True
)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def mount(store_directory: Path, directory_mount: MountedStore) -> MountedStore:
    try:
        pages.own(0, 0)
    except OSError:
        pytest.skip("needs Linux 6.7")
    header = json.dumps({"weights": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    (store_directory / NAME).write_bytes(len(header).to_bytes(8, "little") + header + Random(0).randbytes(SIZE))
    wait_until((directory_mount.path / NAME).exists)  # the mount may have listed its root before
    return directory_mount


def derived(mount: MountedStore, user: int = USER, number: int = 0) -> Path:
    return mount.path / f".trims/{NAME}/derived-{user}-{number}"


def test_the_same_changes_are_had_once(mount: MountedStore, stack: ExitStack) -> None:
    path = mount.path / NAME
    one, other = (Process(stack, path, REVERSED) for _ in range(2))
    expected = one.ask("weights")
    first = one.ask("fold")
    assert (first["own"], first["passed_on"] >= SIZE, first["shared"] >= SIZE) == (0, True, True)
    second = other.ask("fold")
    assert (second["own"], second["passed_on"], second["shared"] >= SIZE) == (0, 0, True)
    assert one.ask("weights") == other.ask("weights") == expected
    assert derived(mount).stat().st_mode & 0o777 == 0o400
    assert Process(stack, path, "").ask("weights") != expected


def test_only_what_is_the_same_is_shared(mount: MountedStore, stack: ExitStack) -> None:
    path = mount.path / NAME
    Process(stack, path, REVERSED).ask("fold")
    half = Process(stack, path, f"{REVERSED}; weights[: len(weights) // 4] = bytes(len(weights) // 4)")
    before = half.ask("weights")
    folded = half.ask("fold")
    assert (folded["own"], SIZE / 4 <= folded["passed_on"] <= SIZE / 4 + 2 * LEAST) == (0, True)
    assert half.ask("weights") == before
    assert derived(mount, number=1).exists()


def test_writing_to_what_is_folded_changes_nothing_for_others(mount: MountedStore, stack: ExitStack) -> None:
    path = mount.path / NAME
    one = Process(stack, path, REVERSED)
    one.ask("fold")
    expected = one.ask("weights")
    writer = Process(stack, path, f"{REVERSED}; model.fold(); weights[:] = bytes(len(weights))")
    assert writer.ask("weights") != expected
    assert one.ask("weights") == expected


def test_users_do_not_meet(mount: MountedStore, stack: ExitStack) -> None:
    path = mount.path / NAME
    Process(stack, path, REVERSED).ask("fold")
    other = Process(stack, path, "weights[:] = bytes(len(weights))", user=OTHER)
    assert other.ask("fold")["own"] == 0
    refused = subprocess.run(["cat", derived(mount)], capture_output=True, text=True, check=False, user=OTHER)
    assert "Permission denied" in refused.stderr
    assert derived(mount, OTHER).exists()


def test_without_the_option_nothing_is_kept(tmp_path: Path, store_directory: Path, mount: MountedStore) -> None:
    with mounted(store_directory, tmp_path / "without", "derived=no") as without, ExitStack() as stack:
        process = Process(stack, without.path / NAME, REVERSED)
        before = process.ask("weights")
        folded = process.ask("fold")
        assert (folded["passed_on"], folded["shared"], folded["own"] >= SIZE) == (0, 0, True)
        assert process.ask("weights") == before


@pytest.mark.usefixtures("mount")
def test_off_a_mount_nothing_is_folded(store_directory: Path, stack: ExitStack) -> None:
    process = Process(stack, store_directory / NAME, REVERSED)
    assert process.ask("fold")["shared"] == 0


def test_a_blob_that_is_evicted_stays_with_those_who_have_it(mount: MountedStore, stack: ExitStack) -> None:
    path = mount.path / NAME
    process = Process(stack, path, REVERSED)
    before = process.ask("weights")
    process.ask("fold")
    with (mount.path / f".trims/{NAME}/evict").open() as command:
        last = json.loads(command.read().splitlines()[-1])
    assert (last["state"], last["kind"]) == ("failed", "InUseError")
    assert process.ask("weights") == before
