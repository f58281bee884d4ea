"""Many programs in forks, ended in every way, several at once: each does what it does plainly, and nothing is left."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.spawn.soaking import Soak
from tests.support.control_groups import control_groups
from tests.support.mounts import wait_until
from tests.support.tmpfs import tmpfs

SEED = "TRIMSFS_SOAK_SEED"
"""The environment variable that has a soak run again as one that has failed."""
FULL = 1 << 16
MOST_PROCESSES = 3


@contextmanager
def _group() -> Iterator[Path | None]:
    """A control group of few processes; None where there can be none."""
    for place in (Path("/sys/fs/cgroup/pids"), control_groups()):
        group = place / f"trimsfs-tests-{uuid.uuid4().hex}"
        with suppress(OSError):
            group.mkdir()
            if (group / "pids.max").exists():
                (group / "pids.max").write_text(f"{MOST_PROCESSES}")
                break
            group.rmdir()
    else:
        yield None
        return
    try:
        yield group
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def _soak(directory: Path, parts: list[int]) -> None:
    """Run so many programs, and look after each of the *parts*."""
    seed = os.environ.get(SEED) or uuid.uuid4().hex
    print(f"{SEED}={seed}")
    with _group() as group, tmpfs(directory / "full", FULL) as full:
        (full / "filling").write_bytes(b"x" * (FULL - os.sysconf("SC_PAGE_SIZE")))
        for name in ("sockets", "cache"):
            (full / name).mkdir(mode=0o700)
        with suppress(OSError):
            (full / "rest").write_bytes(b"x" * FULL)
        soak = Soak(directory, full, group, seed)
        with soak.serving():
            done = 0
            for part in parts:
                soak.run(range(done, part))
                done = part
                soak.look()
        print("\n".join(f"{count:5} {name}" for name, count in soak.counts.most_common()))


@pytest.mark.timeout(120)
def test_programs_end_as_they_should_and_leave_nothing(tmp_path: Path) -> None:
    _soak(tmp_path, [30, 60])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_programs_end_as_they_should_and_leave_nothing(tmp_path: Path) -> None:
    _soak(tmp_path, [100, 400, 700, 1000])
