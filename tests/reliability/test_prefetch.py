"""Servers killed while something comes ahead, again and again: programs that load models notice nothing."""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.reliability.caches import allocated, disagreements
from tests.reliability.loader import MIB, UNNUMBERED, UNNUMBERED_MODELS, Loader, models_in
from tests.reliability.scenes import LONGEST_S, at_rest
from tests.services.fast import start_fast
from tests.support.keepers import keeper, serving
from tests.support.mounts import MountedStore, mounted, wait_until
from tests.support.parts import blob_files, recorded_loads
from tests.support.processes import family
from tests.support.readers import Processes
from tests.support.survival import Survived
from trimsfs.fetch.processes.worker_pool import LINGER_S

BUDGET = 72 * MIB
"""Of the cache: half of what there is."""
RATE = 6 * MIB
"""Bytes a second of a connection: a shard takes a fifth of a second, so that most of the time one comes ahead."""
LOADERS = 3
FETCH_PROCESSES = 2
PROCESSES = 4 + FETCH_PROCESSES
"""The keeper, a server, its spawner, a standby, and those that fetch."""
COMES_S = 20.0
BLOCK = 4096


class Kills:
    """Kills the servers of a mount while they fetch ahead; ``used_files`` counts what programs used of it."""

    def __init__(self, mount: MountedStore) -> None:
        self._mount = mount
        self._draw = random.Random(2)
        self.killed = 0
        self.used_files = 0

    def kill(self) -> None:
        """Kill the server as something comes ahead, and wait for the next."""
        pid = keeper(self._mount)["server_pid"]
        if self.killed % 3 == 2:
            time.sleep(1.1)  # servers that end at once, again and again, are given up
        wait_until(self._comes, timeout_s=COMES_S)
        time.sleep(self._draw.uniform(0, 0.05))
        used = self._metric("used_files_total")
        os.kill(pid, signal.SIGKILL)
        serving(self._mount, not_by=pid)
        self.killed += 1
        self.used_files += used

    def use(self) -> None:
        """Wait until programs have used what the last server has fetched ahead."""
        wait_until(lambda: self._metric("used_files_total") > 0, timeout_s=COMES_S)
        self.used_files += self._metric("used_files_total")

    def _comes(self) -> bool:
        return self._metric("coming_files") > 0

    def _metric(self, name: str) -> int:
        return int(self._mount.metrics()[f"trimsfs_prefetch_{name}"])


def load_unnumbered(mount: MountedStore, bucket: Path) -> None:
    """Load the models of whose order only the record of their last load tells, and wait for that."""
    loader = Loader(mount.path, bucket, 0)
    with ThreadPoolExecutor() as pool:
        for name in UNNUMBERED:
            list(pool.map(loader.read, [f"{model}/{name}" for model in UNNUMBERED_MODELS]))
    assert loader.report.wrong == []
    wait_until(lambda: recorded_loads(mount.cache).count(UNNUMBERED) == len(UNNUMBERED_MODELS))


def check_what_is_here(mount: MountedStore, bucket: Path) -> None:
    """Every file of which something is on the disk can be read, and is right."""
    loader = Loader(mount.path, bucket, 0)
    names = [str(path.relative_to(bucket)) for path in sorted(bucket.rglob("*")) if path.is_file()]
    here = [name for name in names if mount.info(name)["residency"]["disk"]]
    assert here
    for name in here:
        loader.read(name)
    assert loader.report.wrong == []


@pytest.mark.parametrize("cold_open", [pytest.param("stream", marks=pytest.mark.slow), "auto"])
@pytest.mark.parametrize("kills", [2, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(5400)])])
def test_a_server_that_dies_while_it_fetches_ahead_costs_its_readers_nothing(
    kills: int, cold_open: str, tmp_path: Path, survived: Survived
) -> None:
    bucket = tmp_path / "buckets/bucket"
    models_in(bucket)
    options = (
        *("--cold-open", cold_open, "--cache-size", f"{BUDGET}", "--min-free", "0"),
        f"fetch_processes={FETCH_PROCESSES}",
    )
    with start_fast(bucket.parent, rate=RATE) as store:
        with mounted("s3://bucket", tmp_path / "mount", *options, environment=store.environment()) as mount:
            load_unnumbered(mount, bucket)
            keeper_pid = keeper(mount)["keeper_pid"]
            killing = Kills(mount)
            loaders = Processes(lambda seed: Loader(mount.path, bucket, seed), tmp_path, count=LOADERS)
            try:
                for _ in range(kills):
                    killing.kill()
                killing.use()
            finally:
                report = loaders.stop()
            assert (report.errors, report.wrong) == ([], [])
            at_rest(mount)
            wait_until(lambda: allocated(mount.cache) <= BUDGET + BLOCK * len(blob_files(mount.cache)))
            assert keeper(mount)["restarts"] == kills
            # What fetched ahead ends once it has had no job for a while.
            ends_s = LONGEST_S + LINGER_S["background"]
            wait_until(lambda: len(family(keeper_pid)) <= PROCESSES, timeout_s=ends_s)
            assert "Traceback" not in mount.log()
        # The next server frees what a fetch has left that the unmount broke off.
        calm = (*options, "--prefetch", "off")
        with mounted("s3://bucket", tmp_path / "mount", *calm, environment=store.environment()) as mount:
            check_what_is_here(mount, bucket)
        assert disagreements(mount.cache) == []
    print(f"{kills} kills: {killing.used_files} files that came ahead were used")
    assert killing.used_files > 0
    survived(
        f"server killed while it fetches ahead, cold opens {cold_open}",
        injected=killing.killed,
        operations=report.operations,
        errors=report.unexpected(),
        wrong=len(report.wrong),
        recovery_s=max(report.worst_s.values()),
    )
