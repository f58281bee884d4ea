"""Commands that take long, over a slow store on a real mount: how they are ended, and what goes on without them."""

import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.services.fast import start_fast
from tests.services.switch import Switch, switched
from tests.support.keepers import kill
from tests.support.mounts import TRIMSFS, MountedStore, mounted, trimsfs, wait_until

MIB = 1 << 20
RATE = 8 * MIB
"""Bytes a second of each connection: a chunk takes a second."""
DEADLINE_S, LONG_DEADLINE_S = 4, 20
LARGE, SMALL = "large", "model/small"
SIZES = {LARGE: 4 << 30, SMALL: 48 * MIB}


@dataclass(frozen=True, slots=True)
class Slow:
    """A mount of a slow store, which a switch takes away."""

    mount: MountedStore
    switch: Switch

    def path(self, name: str) -> Path:
        return self.mount.path / name

    def in_flight(self) -> bool:
        return self.mount.metrics()["trimsfs_fetch_in_flight"] > 0

    def jobs(self) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = json.loads(trimsfs("jobs", "--json", self.mount.path).stdout)
        return jobs

    def state(self, number: str) -> str:
        """The state of a job."""
        return str(next(job["state"] for job in self.jobs() if job["id"] == number))

    def fetches_nothing(self) -> bool:
        """Whether no request is under way, and none begins."""
        before = self.mount.metrics()["trimsfs_fetch_fetched_bytes_total"]
        time.sleep(0.3)
        return not self.in_flight() and self.mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == before


@contextmanager
def slow_store(directory: Path, deadline_s: int) -> Iterator[Slow]:
    for name, size in SIZES.items():
        path = directory / "buckets/bucket" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, size)
    with start_fast(directory / "buckets", rate=RATE) as server, switched(server) as (behind, switch):
        options = ("--retry-deadline", str(deadline_s), "--digests", "off")
        with mounted("s3://bucket", directory / "mount", *options, environment=behind.environment()) as mount:
            yield Slow(mount, switch)


@pytest.fixture(scope="module")
def module_slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    with slow_store(tmp_path_factory.mktemp("slow"), DEADLINE_S) as slow:
        yield slow


@pytest.fixture
def slow(module_slow: Slow) -> Iterator[Slow]:
    """A mount of a slow store, of which nothing is cached."""
    yield module_slow
    wait_until(lambda: not module_slow.in_flight())
    trimsfs("unpin", module_slow.mount.path)
    wait_until(lambda: trimsfs("evict", module_slow.mount.path).returncode == 0)


@contextmanager
def started(*arguments: str | Path, before: tuple[str, ...] = (), **settings: Any) -> Iterator[subprocess.Popen[str]]:
    """A command of trimsfs that runs in the background of the block."""
    command = [*before, TRIMSFS, *map(str, arguments)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    process = subprocess.Popen(command, text=True, **streams)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("warm", signal.SIGINT, 130),
        ("warm", signal.SIGTERM, -signal.SIGTERM),
        ("warm", signal.SIGKILL, -signal.SIGKILL),
        ("pin", signal.SIGINT, 130),
    ],
)
def test_a_signal_ends_a_command_and_its_fetch(slow: Slow, command: str, number: signal.Signals, code: int) -> None:
    with started(command, slow.path(LARGE)) as process:
        wait_until(slow.in_flight)
        assert slow.mount.info(LARGE)["open"] == 0
        process.send_signal(number)
        began = time.monotonic()
        _, told = process.communicate(timeout=10)
        assert time.monotonic() - began < 6
        assert (process.returncode, told) == (code, "trimsfs: interrupted\n" if code == 130 else "")
        wait_until(slow.fetches_nothing)
    assert slow.mount.info(LARGE)["residency"]["disk"] < SIZES[LARGE] // 2
    assert trimsfs("evict", slow.path(LARGE)).returncode == 0


def test_a_terminal_that_is_closed_ends_a_command_and_its_fetch(slow: Slow) -> None:
    ours, theirs = pty.openpty()
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    before = ("env", "--default-signal=HUP", "setsid", "--ctty")  # tests under nohup ignore the signal
    with started("warm", slow.path(LARGE), before=before, **terminal) as process:
        os.close(theirs)
        wait_until(slow.in_flight)
        assert b"warming" in os.read(ours, 1 << 16)
        os.close(ours)
        process.wait(timeout=10)
        wait_until(slow.fetches_nothing)


def test_a_job_goes_on_until_it_is_cancelled(slow: Slow) -> None:
    done = trimsfs("warm", "--background", slow.path("model"), slow.path(LARGE))
    assert (done.returncode, done.stderr) == (0, "")
    model, large = done.stdout.split()
    wait_until(slow.in_flight)
    assert {job["id"]: (job["path"], job["command"]) for job in slow.jobs()[-2:]} == {
        large: (str(slow.path(LARGE)), "warm-host"),
        model: (str(slow.path("model")), "warm-host"),
    }
    below = json.loads(trimsfs("jobs", "--json", slow.path("model")).stdout)
    assert model in {job["id"] for job in below} <= {job["id"] for job in slow.jobs()} - {large}
    (shown,) = [line.split() for line in trimsfs("jobs", slow.mount.path).stdout.splitlines() if large in line]
    assert shown[:4] == [large, "warm-host", str(slow.path(LARGE)), "running"]
    cancelled = trimsfs("jobs", "cancel", large)
    assert (cancelled.returncode, cancelled.stdout) == (0, f"{large}: cancelled\n")
    # If the other began first, this one had to wait for it. It gives way to other tests, too.
    wait_until(lambda: slow.state(model) == "done", timeout_s=40)
    wait_until(slow.fetches_nothing)
    assert slow.mount.info(LARGE)["residency"]["disk"] < SIZES[LARGE] // 2
    again = trimsfs("jobs", "cancel", model, "00000000")
    assert (again.returncode, again.stdout) == (13, f"{model}: had ended: done\n")
    assert again.stderr == "trimsfs: no job 00000000: see `trimsfs jobs`\n"


def test_the_next_server_goes_on_with_jobs_and_commands(slow: Slow) -> None:
    number = trimsfs("warm", "--background", slow.path(SMALL)).stdout.strip()
    with started("warm", slow.path("model")) as process:
        wait_until(slow.in_flight)
        kill(slow.mount)
        assert slow.state(number) == "running"
        wait_until(lambda: slow.state(number) == "done")
        told, failed = process.communicate(timeout=10)
    assert (process.returncode, failed) == (0, "")
    assert told == f"{slow.path('model')}: warmed 1 file, 50.3 MB\n"
    assert slow.mount.info(SMALL)["residency"]["disk"] == SIZES[SMALL]


def test_a_command_waits_for_a_store_that_comes_back(tmp_path: Path) -> None:
    with slow_store(tmp_path, LONG_DEADLINE_S) as slow, started("warm", slow.path(SMALL)) as process:
        wait_until(slow.in_flight)
        slow.switch.off()
        assert process.stderr is not None
        told = process.stderr.readline()
        reason = rf"the store does not answer, waiting \(\d+ s of {LONG_DEADLINE_S} s\): "
        assert re.match(f"trimsfs: {re.escape(str(slow.path(SMALL)))}: {reason}", told), told
        slow.switch.on()
        assert process.communicate(timeout=20)[1] == f"trimsfs: {slow.path(SMALL)}: the store answers again\n"
        assert process.returncode == 0


def test_after_the_deadline_a_command_fails_and_a_job_waits(slow: Slow) -> None:
    number = trimsfs("warm", "--background", slow.path(SMALL)).stdout.strip()
    with started("warm", "--json", slow.path("model")) as process:
        wait_until(slow.in_flight)
        slow.switch.off()
        lines, failed = process.communicate(timeout=20)
    assert (process.returncode, len(failed.splitlines())) == (7, 1)
    assert any("the store does not answer" in (json.loads(line)["waiting"] or "") for line in lines.splitlines())
    assert slow.state(number) == "waiting"
    assert "waiting  " in trimsfs("jobs", slow.mount.path).stdout
    slow.switch.on()
    wait_until(lambda: slow.state(number) == "done", timeout_s=20)
