"""What every measurement of the study uses: a mount that is timed and watched, and what is measured of each."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import ChildError, measure
from tests.benchmarks.contenders import MOUNTING_S
from tests.benchmarks.data import BUCKET, content
from tests.benchmarks.scaling.processes import Processes
from tests.services.buckets import copied, uploaded
from tests.support.mounts import LAZY, MountedStore, let_in, log_beside, trimsfs, wait_until
from tests.support.processes import alive
from trimsfs import mountinfo

ENTRY_SIZE = 4096
LISTED = 100
"""Names of the directory that is listed where the number of names is not what grows."""
REST_S = 1
VERIFIED_S, END_S = 15, 60
MOUNT, UMOUNT = "trimsfs mount", "trimsfs umount"
OPEN, OPEN_CPU = "open and close of a resident file", "processor time of an open"
STAT, LS, COMMAND_LS = "stat", "list and stat all", "trimsfs ls"
MEMORY, CPU = "memory of all its processes", "processor time of all its processes"


@dataclass(frozen=True, slots=True)
class Mounted(MountedStore):
    """A mount, and how long the command took."""

    seconds: float
    study: "Study"

    @property
    def resident(self) -> Path:
        """The file of which opens are timed."""
        return self.path / "resident/file"

    def opens(self) -> tuple[float, float]:
        """Read a file; then the median of opens of it, and the mount's processor time for one."""
        measure("read", self.resident, self.study.bench.scale.timeout_s)
        wait_until(lambda: bool(self.info("resident/file")["verified"]), VERIFIED_S)
        count, before_s = self.study.bench.scale.operations, self.study.processes.cpu_s()
        outcome = measure("opens", self.resident, self.study.bench.scale.growth_timeout_s, count=count)
        return outcome["p50"], (self.study.processes.cpu_s() - before_s) / count

    def names(self, below: str) -> tuple[float, float]:
        """The median of stats of listed names, and the time to list and stat them all."""
        count = self.study.bench.scale.operations
        outcome = measure("walk", self.path / below, self.study.bench.scale.growth_timeout_s, count=count)
        return outcome["stat"], outcome["seconds"]

    def unmount(self) -> float:
        """Unmount; how long that took."""
        begun = time.monotonic()
        self.study.command("umount", self.path)
        return time.monotonic() - begun


@dataclass(frozen=True, slots=True)
class Study:
    """The benchmarks, and the processes of its mounts."""

    bench: Bench
    processes: Processes

    def layout(self, name: str) -> Path:
        """A new prefix of the bucket, with the file of which opens are timed and a directory that is listed."""
        directory = self.bench.data.store / BUCKET / "scale" / name
        (directory / "resident").mkdir(parents=True)
        file = directory / "resident/file"
        file.write_bytes(content(ENTRY_SIZE, 0))
        uploaded(file)
        copied(directory / "listed", file, LISTED)
        return directory

    def fill(self, directory: Path, count: int, each: int) -> None:
        """Have the endpoint serve *count* objects below a directory of a layout, up to *each* in one directory."""
        file = next(above for above in directory.parents if (above / "resident").exists()) / "resident/file"
        for number in range(0, count, each):
            copied(directory / f"{number:07}", file, min(each, count - number))

    def command(self, *arguments: str | Path) -> None:
        """Run ``trimsfs`` among the processes that are watched. Raises ChildError with what it says."""
        scale = self.bench.scale
        done = trimsfs(
            *arguments,
            environment=self.bench.plain.environment(),
            before=self.processes.enter,
            timeout_s=scale.growth_timeout_s,
        )
        if done.returncode != 0:
            raise ChildError(f"trimsfs {arguments[0]}: exit code {done.returncode}: {done.stderr.strip()}")

    @contextmanager
    def mounted(self, layout: Path, directory: Path) -> Iterator[Mounted]:
        """Mount a layout over the cache in a directory; unmounted at the end in any case, and its processes awaited."""
        path, cache = directory / "models", directory / "cache"
        path.mkdir(exist_ok=True)
        let_in(directory)
        store = f"s3://{BUCKET}/{layout.relative_to(self.bench.data.store / BUCKET)}"
        places = ("--store", store, "--cache-dir", cache, "--log-file", log_beside(directory))
        pids: list[int] = []
        try:
            begun = time.monotonic()
            self.command("mount", path, *places)
            mount = Mounted(path, cache, time.monotonic() - begun, self)
            facts = mount.control()
            pids += [facts["server_pid"], facts["keeper_pid"]]
            yield mount
        except (KeyboardInterrupt, SystemExit):
            time.sleep(MOUNTING_S)  # what the command has started may be about to mount
            raise
        finally:
            if mountinfo.trimsfs_at(path) is not None:
                trimsfs("umount", LAZY, path)
            until = time.monotonic() + END_S
            while any(map(alive, pids)) and time.monotonic() < until:
                time.sleep(0.1)
