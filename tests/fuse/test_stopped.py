"""Processes of a mount that are stopped: readers wait for seconds at most, and what does not run is replaced."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.control_groups import frozen
from tests.support.keepers import keeper, serving
from tests.support.mounts import MountedStore, mountctl, mounted, trimsfs, wait_until
from tests.support.processes import alive, family
from tests.support.readers import Readers
from trimsfs.processes import title_of

pytestmark = pytest.mark.alone  # measures time

READERS = 8
LONGEST_S = 15.0
SIZES = (3 << 20, 100_000, 9 << 20, 1 << 20)
TOLD = {
    "keeper": "the keeper, pid {pid}, is stopped",
    "server": "server {pid} is stopped: killing it",
    "standby": "standby {pid} is stopped: killing it",
    "spawner": "trimsfs.server.startup: the spawner, pid {pid}, is stopped: starting another server",
    "broker": "trimsfs.server.startup: the broker, pid {pid}, is stopped: starting another server",
    "fetch": "fetch process {pid} is stopped: killing it, the next job starts another",
}
"""What the log says of each process that is stopped."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of several sizes, more than the cache is to hold."""
    draw, store = random.Random(1), tmp_path_factory.mktemp("store")
    for model in range(12):
        directory = store / f"model-{model}"
        directory.mkdir()
        for number, size in enumerate(SIZES):
            (directory / f"part-{number}").write_bytes(draw.randbytes(size + model))
    return store


@pytest.fixture(params=["wait", "stream"])
def busy(request: pytest.FixtureRequest, store: Path, tmp_path: Path) -> Iterator[MountedStore]:
    """A mount whose cache holds a third of the store, so that files come and go all the time."""
    options = ("--cache-size", "60MiB", "--min-free", "0", "--cold-open", request.param, "--prefetch", "off")
    with mounted(store, tmp_path, *options) as mount:
        serving(mount)
        yield mount


@pytest.fixture
def waiting(store: Path, tmp_path: Path) -> Iterator[MountedStore]:
    """A mount whose opens wait for the whole file."""
    with mounted(store, tmp_path, "--cold-open", "wait", "--prefetch", "off") as mount:
        serving(mount)
        yield mount


def by_role(mount: MountedStore) -> dict[str, list[int]]:
    """The processes of a mount, by what they are."""
    found: dict[str, list[int]] = {}
    for pid in family(int(str(keeper(mount)["keeper_pid"]))):
        found.setdefault(title_of(pid).split(" ")[1], []).append(pid)
    return found


def read_in_time(mount: MountedStore, store: Path, name: str) -> None:
    began = time.monotonic()
    assert (mount.path / name).read_bytes() == (store / name).read_bytes()
    assert time.monotonic() - began < LONGEST_S


@contextmanager
def halted(pid: int) -> Iterator[None]:
    """A process is stopped by a signal."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("roles", [(role,) for role in TOLD] + [tuple(TOLD)[1:]], ids="+".join)
@pytest.mark.slow
def test_readers_wait_for_seconds_at_most(
    roles: tuple[str, ...], busy: MountedStore, store: Path, tmp_path: Path
) -> None:
    """One process stopped alone, and all but the keeper at once."""
    readers = Readers(busy.path, store, tmp_path, count=READERS)
    try:
        time.sleep(2)
        pids = by_role(busy)
        stopped = [(role, pid) for role in roles for pid in pids[role]]
        for _, pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(15)
        if "keeper" not in roles:
            serving(busy)
            wait_until(lambda: not any(alive(pid) for _, pid in stopped))
    finally:
        report = readers.stop()
        if "keeper" in roles:
            os.kill(pids["keeper"][0], signal.SIGCONT)
    print(roles, report.operations, {kind: round(seconds, 2) for kind, seconds in report.worst_s.items()})
    assert (report.errors, report.wrong) == ([], [])
    assert max(report.worst_s.values()) < LONGEST_S
    for role, pid in stopped if len(roles) == 1 else ():
        assert busy.log().count(TOLD[role].format(pid=pid)) == (2 if role == "broker" else 1)  # the standby shares it


def test_opens_go_on_without_a_keeper_that_is_stopped_until_it_runs_again(waiting: MountedStore, store: Path) -> None:
    pid = int(str(keeper(waiting)["keeper_pid"]))
    with halted(pid):
        for part in range(3):
            read_in_time(waiting, store, f"model-0/part-{part}")
        assert not waiting.info("model-0/part-0")["passthrough"]
        assert waiting.log().count(f"the keeper, pid {pid}, is stopped: new files are read through the server") == 1
        told = trimsfs("status", waiting.path)
        remedy = f"run `kill -CONT {pid}`, or `mountctl recover {waiting.path}`"
        assert (told.returncode, f"pid {pid} is stopped" in told.stdout, remedy in told.stdout) == (1, True, True)
        assert waiting.metrics()["trimsfs_keeper_connected"] == 0
        told = mountctl("status", waiting.path)
        assert (told.returncode, f"is stopped (pid {pid}): {remedy}" in told.stdout) == (1, True), told.stdout
    wait_until(lambda: waiting.metrics()["trimsfs_keeper_connected"] == 1)
    read_in_time(waiting, store, "model-1/part-0")
    assert waiting.info("model-1/part-0")["passthrough"]
    assert keeper(waiting)["restarts"] == 0


@pytest.mark.parametrize("halt", [halted, pytest.param(frozen, marks=pytest.mark.slow)], ids=["stopped", "hangs"])
def test_a_keeper_that_does_not_run_can_be_replaced(
    halt: Callable[[int], AbstractContextManager[None]], waiting: MountedStore, store: Path
) -> None:
    pid = int(str(keeper(waiting)["keeper_pid"]))
    with (waiting.path / "model-0/part-0").open("rb", buffering=0) as file, halt(pid):
        if halt is frozen:
            assert f"does not answer: run `mountctl recover {waiting.path}`" in mountctl("status", waiting.path).stdout
        done = mountctl("recover", waiting.path)
        assert done.returncode == 0, done.stderr
        assert not alive(pid)
        assert keeper(waiting)["keeper_pid"] != pid
        assert f"takes over from pid {pid}, which was stopped and is killed" in waiting.log()
        assert file.readall() == (store / "model-0/part-0").read_bytes()
    read_in_time(waiting, store, "model-1/part-0")
    assert waiting.info("model-1/part-0")["passthrough"]
    assert trimsfs("status", waiting.path).returncode == 0


@pytest.mark.parametrize("role", ["server", "standby", "spawner", "broker"])
def test_what_is_stopped_is_replaced(role: str, waiting: MountedStore, store: Path) -> None:
    (pid,) = by_role(waiting)[role]
    os.kill(pid, signal.SIGSTOP)
    read_in_time(waiting, store, "model-0/part-0")
    wait_until(lambda: not alive(pid))
    serving(waiting)
    assert len(by_role(waiting)[role]) == 1
    assert waiting.log().count(TOLD[role].format(pid=pid)) == (2 if role == "broker" else 1)  # the standby shares it


def test_fetch_processes_that_are_stopped_are_replaced(waiting: MountedStore, store: Path) -> None:
    read_in_time(waiting, store, "model-0/part-0")
    pids = by_role(waiting)["fetch"]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    read_in_time(waiting, store, "model-1/part-0")
    wait_until(lambda: not any(alive(pid) for pid in pids))
    assert all(waiting.log().count(TOLD["fetch"].format(pid=pid)) == 1 for pid in pids)
    assert keeper(waiting)["restarts"] == 0


@pytest.mark.parametrize("seconds", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_nobody_is_killed_after_all_have_been_stopped(seconds: float, waiting: MountedStore, store: Path) -> None:
    read_in_time(waiting, store, "model-0/part-0")
    before = by_role(waiting)
    pids = [pid for each in before.values() for pid in each]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    time.sleep(5)
    read_in_time(waiting, store, "model-1/part-0")
    idle = before.pop("fetch")  # it ends after 30 s without a job
    assert [pid for pid in pids if not alive(pid) and pid not in idle] == []
    assert "killing it" not in waiting.log()
    assert keeper(waiting)["restarts"] == 0
