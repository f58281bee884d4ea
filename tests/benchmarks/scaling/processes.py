"""All processes of mounts, found by a control group, wherever they were forked from."""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.machine import own_memory_bytes

END_S = 60
_ENTER = 'echo $$ > "$0" && exec "$@"'


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of all commands that were started with `enter` before them, and all their descendants."""

    group: Path

    @property
    def enter(self) -> tuple[str, ...]:
        """What starts a command in the group."""
        return ("sh", "-c", _ENTER, str(self.group / "cgroup.procs"))

    def pids(self) -> list[int]:
        """Those that run."""
        return [int(line) for line in (self.group / "cgroup.procs").read_text().split()]

    def cpu_s(self) -> float:
        """Processor time of all so far, of those that have ended, too."""
        fields = dict(line.split() for line in (self.group / "cpu.stat").read_text().splitlines())
        return int(fields["usage_usec"]) / 1e6

    def memory_bytes(self, caches: Path) -> int:
        """PSS of all, without the files below *caches* that they map."""
        return own_memory_bytes(self.pids(), caches)

    def wakeups(self) -> int:
        """How often their threads have gone to sleep so far, of those that run."""
        total = 0
        for pid in self.pids():
            with suppress(OSError):
                for task in Path(f"/proc/{pid}/task").iterdir():
                    lines = (task / "status").read_text().splitlines()
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
        return total


@contextmanager
def watched() -> Iterator[Processes]:
    """A group for processes of mounts. Raises OSError where no control group of version 2 can be made."""
    group = _hierarchy() / f"trimsfs-bench-{os.getpid()}"
    group.mkdir()
    try:
        yield Processes(group)
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    """Remove a group once its processes have ended; the kernel counts one that ends for a while after its number."""
    until = time.monotonic() + END_S
    while True:
        try:
            return group.rmdir()
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= until:
                error.add_note(f"processes that have not ended: {(group / 'cgroup.procs').read_text().split()}")
                raise
        time.sleep(0.1)


def _hierarchy() -> Path:
    """Where version 2 is mounted, alone or beside version 1: it counts processor time also without its controllers."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _, path, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(path)
    raise FileNotFoundError("no control groups of version 2 are mounted")
