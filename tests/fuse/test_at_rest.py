"""A mount that nobody uses: what its processes take while nothing is to be done."""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.support.keepers import roles, serving
from tests.support.mounts import MountedStore, mounted

SETTLES_S, WATCHED_S = 4.0, 6.0
MOST_MIB = 72
"""Of all processes: 150 while a standby was loaded by itself and fetch processes waited."""
MOST_OF_A_FORK_MIB = 5
MOST_WAKEUPS = 3
"""A second: 27 while the journal was looked at 20 times a second."""


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    directory = tmp_path_factory.mktemp("at-rest")
    store = directory / "store"
    store.mkdir()
    (store / "model").write_bytes(b"weights")
    with mounted(store, directory) as mount:
        serving(mount)
        time.sleep(SETTLES_S)
        yield mount


def memory_mib(pid: int, kind: str) -> float:
    """Memory of a process that is of no file."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:"))


def wakeups(pids: Iterable[int]) -> int:
    """How often the threads of processes have slept so far."""
    return sum(
        int(line.split()[1])
        for pid in pids
        for thread in os.listdir(f"/proc/{pid}/task")
        for line in Path(f"/proc/{pid}/task/{thread}/status").read_text().splitlines()
        if line.startswith("voluntary_ctxt_switches:")
    )


def test_a_mount_at_rest_takes_little_memory(mount: MountedStore) -> None:
    found = roles(mount)
    assert sorted(found.values()) == ["broker", "keeper", "server", "spawner", "standby"]
    taken = {f"{role} {pid}": memory_mib(pid, "Pss_Anon") for pid, role in found.items()}
    assert sum(taken.values()) < MOST_MIB, taken
    own = {role: memory_mib(pid, "Private_Dirty") for pid, role in found.items() if role in {"standby", "spawner"}}
    assert max(own.values()) < MOST_OF_A_FORK_MIB, own


@pytest.mark.alone  # measures time
def test_a_mount_at_rest_hardly_wakes_up(mount: MountedStore) -> None:
    pids = roles(mount)
    began, before = time.monotonic(), wakeups(pids)
    time.sleep(WATCHED_S)
    assert wakeups(pids) - before < MOST_WAKEUPS * (time.monotonic() - began)
