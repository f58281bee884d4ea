"""Servers killed, and hosts that lose power, at every point at which something is written."""

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.caches import disagreements, recorded
from tests.reliability.lives import Order
from tests.reliability.looks import models_in
from tests.reliability.points import How, Plan, plan_in
from tests.support.keepers import keeper, serving
from tests.support.mounts import MountedStore, mounted, trimsfs, unmount
from tests.support.readers import Readers
from tests.support.survival import Survived
from tests.support.tmpfs import tmpfs

slow = pytest.mark.slow
KILLED, TORN, CUT = (
    "killed while it writes",
    "killed halfway through a write",
    "power lost once a successor has settled",
)
POWER = "power lost while it writes"

ORDERS = [
    pytest.param(KILLED, Order(count=10), id="killed"),
    pytest.param(TORN, Order(count=6, how=How.TEAR), id="torn", marks=slow),
    pytest.param(POWER, Order(count=6, how=How.POWER, kind="xfs"), id="power-xfs"),
    pytest.param(POWER, Order(count=6, how=How.POWER, kind="ext4", synced=0.8), id="power-ext4-synced", marks=slow),
    pytest.param(CUT, Order(count=4, kind="xfs", cut=True), id="cut-xfs", marks=slow),
    pytest.param(KILLED, Order(count=None), id="killed-everywhere", marks=slow),
    pytest.param(TORN, Order(count=150, how=How.TEAR), id="torn-often", marks=slow),
    *(
        pytest.param(POWER, Order(count=120, seed=seed, how=How.POWER, kind=kind, synced=synced), id=name, marks=slow)
        for seed, (kind, synced, name) in enumerate(
            [
                ("xfs", None, "power-xfs-often"),
                ("xfs", 0.5, "power-xfs-half-synced"),
                ("xfs", 0.95, "power-xfs-synced-of-late"),
                ("ext4", None, "power-ext4-often"),
                ("ext4", 0.5, "power-ext4-half-synced"),
                ("ext4", 0.95, "power-ext4-synced-of-late"),
            ]
        )
    ),
    *(
        pytest.param(CUT, Order(count=100, kind=kind, cut=True), id=f"cut-{kind}-often", marks=slow)
        for kind in ("xfs", "ext4")
    ),
]


@pytest.mark.parametrize(("fault", "order"), ORDERS)
@pytest.mark.timeout(1200)
def test_what_a_crash_leaves_is_right_accounted_for_and_gone_on_with(
    fault: str, order: Order, tmp_path: Path, survived: Survived
) -> None:
    with tmpfs(tmp_path / "memory", 512 << 20) as directory, plan_in(tmp_path) as (_, environment):
        done = subprocess.run(
            [sys.executable, "-m", "tests.reliability.lives", directory, json.dumps(dataclasses.asdict(order))],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=1100,
            check=False,
        )
        if done.stderr.startswith("skipped: "):
            pytest.skip(done.stderr)
        assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    problems = [f"point {one['at']}: {one['problem']}" for one in outcomes["lives"] if one["problem"]]
    assert not problems, "\n".join(problems)
    deaths = sum(one["died"] for one in outcomes["lives"])
    assert deaths >= 0.9 * (len(outcomes["lives"]) - 1)  # a life may be over before its last points
    kind = f" ({order.kind})" if order.kind else ""
    survived(
        f"cache: {fault}{kind}, at {deaths} of {outcomes['calls']} points",
        injected=deaths,
        operations=len(outcomes["lives"]),
        recovery_s=outcomes["looked_s"],
    )


SIZES = (20 << 20, 9 << 20, 300_000)


@pytest.fixture
def store(store_directory: Path) -> Path:
    return models_in(store_directory, SIZES)


class Crashes:
    """A mount whose server is killed at points drawn by a seed, while programs read and commands are given."""

    def __init__(self, mount: MountedStore, plan: Plan, seed: int) -> None:
        self.mount = mount
        self.plan = plan
        self.draw = random.Random(seed)
        self.injected = 0
        self.slowest_s = 0.0
        self.pinned = set[str]()

    def crash(self) -> None:
        """Have the server killed at a point, and wait for the next."""
        pid = serving(self.mount)
        self.plan.set(self.draw.randint(1, 60), self.draw.choice([How.KILL, How.TEAR]), victim=pid)
        deadline = time.monotonic() + 20
        while keeper(self.mount)["server_pid"] == pid and time.monotonic() < deadline:
            self.command()
        self.plan.set(0)
        began = time.monotonic()
        serving(self.mount, not_by=pid)
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        self.injected += 1

    def command(self) -> None:
        """Give a command that changes the cache; a server that dies ends it."""
        name = f"model-{self.draw.randrange(4)}/part-{self.draw.randrange(3)}"
        verb = self.draw.choice(["pin", "unpin", "evict", "warm"])
        done = trimsfs(verb, self.mount.path / name)
        if verb == "pin" and done.returncode == 0:
            self.pinned.add(name)
        elif verb == "unpin":
            self.pinned.discard(name)


@pytest.mark.parametrize(("crashes", "seed"), [(3, 1), *(pytest.param(60, seed, marks=slow) for seed in (2, 3))])
@pytest.mark.timeout(900)
def test_a_server_that_dies_at_any_write_costs_its_readers_nothing(
    crashes: int, seed: int, store: Path, tmp_path: Path, survived: Survived
) -> None:
    options = ("--cache-size", "70MiB", "--min-free", "0")
    with plan_in(tmp_path) as (plan, environment):
        environment["CRASH_PROGRAM"] = "trimsfs.daemon"
        with mounted(store, tmp_path, *options, environment=environment) as mount:
            crashing = Crashes(mount, plan, seed)
            readers = Readers(mount.path, store, tmp_path, count=3)
            try:
                for number in range(crashes):
                    if number % 3 == 2:
                        time.sleep(1.1)  # servers that end at once, again and again, are given up
                    crashing.crash()
            finally:
                report = readers.stop()
            assert "Traceback" not in mount.log()
            facts = keeper(mount)
            for pid in (facts["keeper_pid"], facts["server_pid"]):
                with contextlib.suppress(ProcessLookupError):  # a server ends with its keeper
                    os.kill(pid, signal.SIGKILL)
            unmount(mount.path)
        pins = {row.key for row in recorded(tmp_path / "cache").values() if row.pinned}
        assert crashing.pinned <= pins
        with mounted(store, tmp_path, *options) as mount:
            for path in sorted(store.rglob("part-*")):
                assert (mount.path / path.relative_to(store)).read_bytes() == path.read_bytes()
    assert disagreements(tmp_path / "cache") == []
    survived(
        "server killed at a write, on a mount in use",
        injected=crashing.injected,
        operations=report.operations,
        errors=report.unexpected(),
        wrong=len(report.wrong),
        recovery_s=crashing.slowest_s,
    )
