"""Servers that are killed and replaced while very many names are known and very many files are open."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from tests.services.buckets import copied, copy_name, uploaded
from tests.services.fast import start_fast
from tests.support.keepers import keeper
from tests.support.mounts import MOUNTCTL, MountedStore, mounted, trimsfs, wait_until
from tests.support.survival import Survived

ROOT = Path(__file__).parents[2]
EACH = 1000
"""Files in a directory."""
LOOKS = 1000
"""Names that are looked at after each fault, and as many files that are opened."""
SPARE_DESCRIPTORS = 64
CONTENT = random.Random(7).randbytes(4096)
PATIENCE_S = 120


@dataclass(frozen=True, slots=True)
class Many:
    """A mount of many names, and programs that hold the first of them open."""

    mount: MountedStore
    names: int
    files: int
    holders: list[subprocess.Popen[str]]

    def path(self, number: int) -> Path:
        return self.mount.path / f"{number // EACH:04}" / copy_name(number % EACH)

    def look(self, draw: random.Random) -> int:
        """Stat names, list a directory, open and read files anew, and those that are open; how many operations."""
        for number in draw.choices(range(self.names), k=LOOKS):
            assert self.path(number).stat().st_size == len(CONTENT)
        directory = self.path(draw.randrange(self.names)).parent
        assert len(os.listdir(directory)) == EACH
        with pytest.raises(FileNotFoundError):
            (directory / "absent").stat()
        for number in draw.choices(range(self.files), k=LOOKS):
            assert self.path(number).read_bytes() == CONTENT
        return 2 * LOOKS + 2

    def read_open_files(self, errors: Counter[str]) -> tuple[int, int]:
        """Have the programs read what they have open: reads, and how many of them gave wrong bytes."""
        for holder in self.holders:
            pipe(holder.stdin).write("\n")
            pipe(holder.stdin).flush()
        outcomes = [json.loads(pipe(holder.stdout).readline()) for holder in self.holders]
        for outcome in outcomes:
            errors.update(outcome["errors"])
        return sum(outcome["operations"] for outcome in outcomes), sum(outcome["wrong"] for outcome in outcomes)

    def inflict(self, fault: str) -> float:
        """Have the server killed or replaced by another; how long a name that is asked for then takes."""
        before = keeper(self.mount)["server_pid"]
        if fault == "killed":
            os.kill(before, signal.SIGKILL)
        else:
            done = subprocess.run(
                [MOUNTCTL, fault, self.mount.path], capture_output=True, text=True, timeout=PATIENCE_S, check=False
            )
            assert done.returncode == 0, done.stderr
        began = time.monotonic()
        (self.mount.path / "absent").exists()
        answered_s = time.monotonic() - began

        def replaced() -> bool:
            facts = keeper(self.mount)
            return facts["state"] == "serving" and facts["server_pid"] != before and bool(facts["standby"])

        wait_until(replaced, PATIENCE_S)
        return answered_s


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


@contextmanager
def held(mount: MountedStore, files: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Programs that have the first files open, as many as it takes with the descriptors that each may have."""
    share = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_DESCRIPTORS
    program = [sys.executable, "-m", "tests.reliability.file_holder", str(mount.path)]
    with ExitStack() as stack:
        holders = []
        for first in range(0, files, share):
            arguments = [str(first), str(min(share, files - first)), str(len(CONTENT))]
            holder = subprocess.Popen(
                [*program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
            )
            stack.enter_context(holder)
            stack.callback(holder.kill)
            assert pipe(holder.stdout).readline() == "ready\n"
            holders.append(holder)
        yield holders


def fetched(directory: Path) -> bool:
    """Fetch all of a directory; whether it was kept."""
    return trimsfs("warm", directory).returncode == 0


@contextmanager
def many(directory: Path, names: int, files: int) -> Iterator[Many]:
    """A mount all of whose names are known, and whose first files are here and open."""
    bucket = directory / "store/bucket"
    bucket.mkdir(parents=True)
    file = directory / "file"
    file.write_bytes(CONTENT)
    uploaded(file)
    for number in range(names // EACH):
        copied(bucket / f"{number:04}", file, EACH)
    with (
        start_fast(directory / "store") as store,
        mounted("s3://bucket", directory / "mount", environment=store.environment()) as mount,
    ):
        listed = sum(len(os.listdir(entry)) for entry in sorted(mount.path.iterdir()))
        assert listed == names
        for number in range(files // EACH):
            # A server keeps files open until they are on the disk: what it has no descriptors for comes later.
            wait_until(partial(fetched, mount.path / f"{number:04}"), PATIENCE_S)
        with held(mount, files) as holders:
            yield Many(mount, names, files, holders)
        wait_until(lambda: mount.metrics()["trimsfs_files_open_handles"] == 0, PATIENCE_S)


@pytest.mark.parametrize(
    ("names", "files", "faults"),
    [
        (3_000, 1_000, ("killed", "upgrade")),
        pytest.param(1_000_000, 100_000, ("killed", "killed", "upgrade", "restart", "killed"), marks=pytest.mark.slow),
        # As many names as 4,000 mounts of a thousand each have.
        pytest.param(4_000_000, 4_000, ("killed", "upgrade", "killed"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(3600)
def test_servers_follow_each_other_with_many_names_and_open_files(
    names: int, files: int, faults: Sequence[str], tmp_path: Path, survived: Survived
) -> None:
    draw, errors = random.Random(3), Counter[str]()
    operations = wrong = 0
    waits = []
    with many(tmp_path, names, files) as scene:
        for fault in faults:
            waits.append(scene.inflict(fault))
            operations += scene.look(draw)
            reads, wrong_reads = scene.read_open_files(errors)
            operations, wrong = operations + reads, wrong + wrong_reads
        assert scene.mount.metrics()["trimsfs_server_restarts_total"] == len(faults)
    survived(
        f"server killed or replaced with {names:,} names and {files:,} open files",
        injected=len(faults),
        operations=operations,
        errors=errors,
        wrong=wrong,
        recovery_s=max(waits),
    )
