"""Everything at once, for as long as one likes: ``python -m tests.reliability.soak --minutes 15 --seed 1``.

Processes read, warm, evict, pin and unpin; objects are replaced and deleted; the store answers wrongly, stands still
and is killed; servers of the mount are killed, and run under a limit of memory. In the end all is quiet, every byte is
what was put, and nothing is left behind.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tests.reliability.caches import allocated
from tests.reliability.commander import Commander
from tests.reliability.processes import described, descriptors, seeing, states
from tests.reliability.readers import FaultReader
from tests.reliability.scenes import LONGEST_S, WARM, Scene, check, scene
from tests.services import SCRATCH
from tests.services.ceph import Ceph, start_ceph
from tests.services.faults import FAULTS
from tests.services.faulty import Plan
from tests.support.keepers import keeper, serving
from tests.support.memory_group import killed, limited, used
from tests.support.mounts import let_in, trimsfs, wait_until
from tests.support.processes import family
from tests.support.readers import Processes, Report
from tests.support.survival import Survived
from trimsfs.fetch.processes.worker_pool import LINGER_S
from trimsfs.mountinfo import mount_at

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MIB = 1 << 20
CACHE_SIZE = 160 * MIB
MEMORY = 640 * MIB
"""For the keeper, two servers, their fetch processes, and the page cache of what they fetch."""
OPTIONS = (
    *("--cache-size", str(CACHE_SIZE), "--min-free", "0", "--host-size", "96MiB", "--memory-limit", "64MiB"),
    *("--retry-deadline", "2", "stall_timeout=1"),
)
READERS, COMMANDERS = 4, 2
SIZES = (1, 4096, 100_000, 700_000, 3 * MIB, 9 * MIB, 17 * MIB + 5)
GROUPS = {"steady": 28, "changing": 10, "fleeting": 10}
GAUGES = ("files_open_handles", "files_passthrough_handles", "fetch_in_flight", "fetch_waiting", "disk_open_blobs")
SPARE = {"socket open in the server": 16, "memory open in the server": 4}
"""Connections to the store that may be used again, as many as requests may run at once; chunks without room on disk."""
SILENT = {"flipped bit"}
"""What is not found before the whole of a file is here, so that readers of a part may see it."""
OVER_S = 10.0
"""How long what a killed server had written and not recorded may take room, until its successor has given it back."""
KILL_EVERY_S, STORM_EVERY_S, LOOK_EVERY_S = 15.0, 4.0, 0.5
OUTAGE_EVERY_S, OUTAGE_S = 300.0, (60.0, 150.0)
"""The store is away for minutes: what is here must be read as if it were not, by the next server as well."""


@dataclass(slots=True)
class Outcome:
    """What came of it; ``problems`` are what should not be.

    Of what was seen from outside while it went on, ``cache_bytes``, ``peak`` and ``anonymous`` are the most bytes on
    the disk, in memory and in anonymous memory, and ``over_s`` is how long more was on the disk than may be.
    """

    seconds: float
    report: Report = field(default_factory=Report)
    commands: Report = field(default_factory=Report)
    events: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    cache_bytes: int = 0
    over_s: float = 0.0
    anonymous: int = 0
    peak: int = 0
    looks: int = 0
    figures: dict[str, object] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    recovery_s: float = 0.0

    def check(self, survived: Survived) -> None:
        """Make it a line of the table of all faults."""
        total = self.injected.total() + self.events.total()
        allowed = ("EIO", "EACCES", "ESTALE")
        check(survived, f"soak of {self.seconds:.0f} s", self.report, total, self.recovery_s, allowed)


class Soak:
    """One mount, and all that is done to it."""

    def __init__(self, stage: Scene, ceph: Ceph, client: "S3Client", group: Path | None, seed: int) -> None:
        self._stage = stage
        self._ceph = ceph
        self._client = client
        self._group = group
        self._seed = seed
        self._draw = random.Random(seed)
        self._keeper = keeper(stage.mount)["keeper_pid"]
        self._ended = threading.Event()
        self._stuck: list[str] = []
        self._names = {kind: self._put(kind, count) for kind, count in GROUPS.items()}
        if group is not None:
            for pid in family(self._keeper):
                (group / "cgroup.procs").write_text(str(pid))
        self._kill()  # what the next servers use is charged to the group from the first byte on
        self._before = self._quiet({})

    def _put(self, kind: str, count: int) -> list[str]:
        sizes = {f"{kind}/{number % 3}/{number}": SIZES[number % len(SIZES)] for number in range(count)}
        self._stage.objects.sizes |= sizes
        self._stage.objects.put_all(self._stage.server, sizes)
        return list(sizes)

    def run(self, seconds: float) -> Outcome:
        """Do it all for so long, and then look at what is left."""
        outcome = Outcome(seconds)
        mount = self._stage.mount.path
        trimsfs("pin", mount / "warm")
        with contextlib.ExitStack() as opened:
            # A server that follows another knows the names that the kernel knows, and what is open it does not forget.
            for name in WARM:
                opened.enter_context((mount / name).open("rb"))
            self._all(seconds, outcome)
        self._settle(outcome)
        return outcome

    def _all(self, seconds: float, outcome: Outcome) -> None:
        mount, names = self._stage.mount.path, self._names
        watch = threading.Thread(target=self._watch, args=(outcome,))
        readers = Processes(self._reader, self._directory("readers"), count=READERS)
        everything = [name for kind in names.values() for name in kind]
        commanders = Processes(
            lambda number: Commander(mount, everything, self._seed * 100 + number),
            self._directory("commanders"),
            count=COMMANDERS,
        )
        try:
            watch.start()
            self._storm(time.monotonic() + seconds, outcome.events)
        finally:
            outcome.report.add(readers.stop(60))
            outcome.commands.add(commanders.stop(60))
            outcome.injected = self._stage.through.injected()
            self._stage.through.heal()
            self._ended.set()
            watch.join()

    def _directory(self, name: str) -> Path:
        directory = self._stage.directory / name
        directory.mkdir()
        return directory

    def _reader(self, number: int) -> FaultReader:
        names = self._names
        return FaultReader(
            self._stage.mount.path,
            self._stage.objects,
            self._seed * 100 + number,
            firm=list(WARM),
            listed=False,  # a server that follows another knows what the kernel knows, which is no listing
            shaky=names["steady"] + names["changing"],
            fleeting=names["fleeting"],
        )

    # What is done

    def _storm(self, until: float, events: Counter[str]) -> None:
        draw, gateway = self._draw, self._ceph.gateway
        next_plan = next_kill = time.monotonic()
        next_outage = next_plan + draw.uniform(0.3, 0.7) * OUTAGE_EVERY_S
        while (now := time.monotonic()) < until:
            if now >= next_plan:
                next_plan = now + draw.uniform(0, 2 * STORM_EVERY_S)
                self._stage.through.inject(self._plan())
                events["plans of faults"] += 1
            if now >= next_kill:
                next_kill = now + draw.uniform(0.5, 1.5) * KILL_EVERY_S
                self._kill()
                events["servers killed"] += 1
            if now >= next_outage:
                next_outage = now + draw.uniform(0.7, 1.3) * OUTAGE_EVERY_S
                self._outage(min(draw.uniform(*OUTAGE_S), max(0.0, until - now)))
                events["outages of minutes"] += 1
                events["servers killed"] += 1
            name = draw.choice(self._names["changing"] + self._names["fleeting"])
            if name in self._names["fleeting"] and draw.random() < 0.5:
                self._stage.objects.delete(self._client, name)
                events["objects deleted"] += 1
            else:
                self._stage.objects.put(self._client, name)
                events["objects put"] += 1
            if draw.random() < 0.01:
                gateway.halt()
                self._ended.wait(draw.uniform(0.1, 3))
                gateway.resume()
                events["store halted"] += 1
            elif draw.random() < 0.005:
                gateway.kill()
                self._ended.wait(draw.uniform(0, 2))
                gateway.start()
                events["store killed"] += 1
            self._ended.wait(draw.uniform(0, 0.3))

    def _plan(self) -> Plan:
        possible = sorted(FAULTS.keys() - SILENT)
        faults = self._draw.sample(possible, self._draw.randint(1, len(possible)))
        share = self._draw.choice([0, 0.05, 0.2, 0.5, 0.5, 1.0])
        return Plan(faults=faults, share=share, seed=self._draw.getrandbits(32))

    def _outage(self, seconds: float) -> None:
        """Take the store away, and in the middle of it the server."""
        gateway, halted = self._ceph.gateway, self._draw.random() < 0.5
        if halted:
            gateway.halt()
        else:
            gateway.kill()
        try:
            self._ended.wait(seconds / 2)
            self._kill()
            self._ended.wait(seconds / 2)
        finally:
            if halted:
                gateway.resume()
            else:
                gateway.start()

    def _kill(self) -> None:
        pid = serving(self._stage.mount)
        os.kill(pid, signal.SIGKILL)
        serving(self._stage.mount, not_by=pid)

    # What is looked at

    def _watch(self, outcome: Outcome) -> None:
        """Look at the cache and at memory from outside, and for who waits in the kernel for too long."""
        waits: dict[int, float] = {}
        fitted = time.monotonic()
        while not self._ended.wait(LOOK_EVERY_S):
            outcome.looks += 1
            now, taken = time.monotonic(), allocated(self._stage.mount.cache)
            outcome.cache_bytes = max(outcome.cache_bytes, taken)
            if taken <= CACHE_SIZE:
                fitted = now
            outcome.over_s = max(outcome.over_s, now - fitted)
            if self._group is not None:
                outcome.peak, anonymous = used(self._group)
                outcome.anonymous = max(outcome.anonymous, anonymous)
            stuck = {pid for pid, state in states(self._ours()).items() if state == "D"}
            waits = {pid: waits.get(pid, now) for pid in stuck}
            for pid, since in waits.items():
                if now - since > LONGEST_S:
                    self._stuck.append(f"process {pid} has been in state D for {now - since:.0f} s")

    def _ours(self) -> Iterator[int]:
        yield from family(os.getpid())
        yield from family(self._keeper)

    def _quiet(self, before: dict[str, float]) -> dict[str, float]:
        """The gauges, descriptors and processes once nothing of the mount is in use, and as *before* if that may be."""
        mount = self._stage.mount
        trimsfs("unpin", mount.path)
        trimsfs("evict", mount.path)
        ends = time.monotonic() + LONGEST_S + max(LINGER_S["fetch"], LINGER_S["background"])
        while True:
            found = self._used()
            quiet = all(number <= before.get(name, 0) + SPARE.get(name, 0) for name, number in found.items())
            if quiet or time.monotonic() > ends:
                return found
            time.sleep(0.2)

    def _used(self) -> dict[str, float]:
        mount = self._stage.mount
        server = serving(mount)
        metrics = mount.metrics()
        found = {name: metrics[f"trimsfs_{name}"] for name in GAUGES}
        for who, pid in (("server", server), ("keeper", self._keeper)):
            found |= {f"{what} open in the {who}": number for what, number in descriptors(pid).items()}
        # What is left of objects that were replaced stays until room is needed: each blob is open, and mapped.
        due = 2 * len(list((mount.cache / "blobs").glob("*/*")))
        found["blobs open in the server"] = max(0, found.get("blobs open in the server", 0) - due)
        # Fetch processes stay for 30 s after the last job.
        return found | {"processes": sum("trimsfs fetch" not in described(pid) for pid in family(self._keeper))}

    def _settle(self, outcome: Outcome) -> None:
        """All is quiet: everything is as it was put, and what was taken has been given back."""
        stage, problems = self._stage, outcome.problems
        for name in self._names["fleeting"]:
            stage.objects.put(self._client, name)
        with _told(problems, "not all can be read in the end"):
            outcome.recovery_s = stage.settled([name for kind in self._names.values() for name in kind])
        with _told(problems, "not quiet in the end"):
            after = self._quiet(self._before)
            for name, number in after.items():
                before = self._before.get(name, 0)
                outcome.figures[name] = f"{before:g} → {number:g}"
                if number > before + SPARE.get(name, 0):
                    problems.append(f"{name}: {before:g} before, {number:g} after")
                    if name == "processes":
                        problems += map(described, family(self._keeper))
        restarts = keeper(stage.mount)["restarts"]
        for who, errors in (("readers", outcome.report.errors), ("commands", outcome.commands.errors)):
            told = Counter(one.strip().splitlines()[-1] for one in errors)
            problems += [f"{who}, {number} times: {one}" for one, number in told.most_common(5)]
        problems += self._stuck[:3]
        longest = outcome.report.worst_s | outcome.commands.worst_s
        checks = {
            f"wrong: {outcome.report.wrong[:5]}": len(outcome.report.wrong) > 0,
            f"{restarts} servers were followed by others": restarts != outcome.events["servers killed"] + 1,
            f"an operation took longer than {LONGEST_S:g} s": max(longest.values(), default=0.0) > LONGEST_S,
            f"too much on disk for {outcome.over_s:.0f} s": outcome.over_s > OVER_S,
            "a defect is in the log": "Traceback" in stage.mount.log(),
            "a process was killed for want of memory": self._group is not None and killed(self._group) > 0,
            "more memory than it may use": outcome.anonymous > MEMORY,
            "nothing was looked at": outcome.looks == 0 or outcome.report.operations == 0,
        }
        problems += [problem for problem, is_so in checks.items() if is_so]


@contextlib.contextmanager
def _told(problems: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, OSError, KeyError) as error:
        problems.append(f"{what}: {error!r}")


def soak(seconds: float, seed: int, directory: Path) -> Outcome:
    """Do it in a directory that is empty; nothing is left of it, or that is among the problems."""
    with contextlib.ExitStack() as stack:
        group: Path | None = None
        missing = ""
        try:
            group = stack.enter_context(limited(MEMORY))
        except OSError as error:
            missing = f"none: no control group can be made: {error}"
        ceph = stack.enter_context(start_ceph())
        client = stack.enter_context(contextlib.closing(ceph.client()))
        with scene(ceph, directory, *OPTIONS) as stage:
            one = Soak(stage, ceph, client, group, seed)
            outcome = one.run(seconds)
            mountpoint = stage.mount.path
        if mount_at(mountpoint) is not None:
            outcome.problems.append(f"{mountpoint} is still mounted")
        left = [] if group is None else _left(group)
        if left:
            outcome.problems.append(f"processes are left: {left}")
            outcome.problems += [f"which sees the mount: {described(pid)}" for pid in seeing(mountpoint)]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            _wait(lambda: not _left(group) if group is not None else True)
        outcome.figures["limit of memory"] = missing or f"{MEMORY / MIB:.0f} MiB"
    return outcome


def _left(group: Path) -> list[int]:
    """The processes of a group that do not end by themselves in a moment."""
    _wait(lambda: not (group / "cgroup.procs").read_text())
    return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]


def _wait(condition: Callable[[], bool]) -> None:
    with contextlib.suppress(AssertionError):
        wait_until(condition, timeout_s=5)


def table(outcome: Outcome) -> Table:
    found = Table("what", "how much", title=f"soak of {outcome.seconds:.0f} s")
    found.add_row("operations of readers", str(outcome.report.operations))
    found.add_row("steps of commands", str(outcome.commands.operations))
    found.add_row("wrong bytes", str(len(outcome.report.wrong)))
    errors = ", ".join(f"{number} {name}" for name, number in sorted(outcome.report.errnos.items()))
    found.add_row("documented errors of readers", errors or "0")
    found.add_row("others", str(len(outcome.report.errors) + len(outcome.commands.errors)))
    for what, number in sorted(outcome.events.items()):
        found.add_row(what, str(number))
    found.add_row("faults of the store", f"{outcome.injected.total()}, of {len(outcome.injected)} kinds")
    longest = sorted((outcome.report.worst_s | outcome.commands.worst_s).items(), key=lambda one: -one[1])
    found.add_row("longest operations", ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in longest[:4]))
    found.add_row("first read after the end", f"{outcome.recovery_s:.2f} s")
    found.add_row("most on disk", f"{outcome.cache_bytes / MIB:.1f} of {CACHE_SIZE / MIB:.0f} MiB")
    found.add_row("most memory, page cache included", f"{outcome.peak / MIB:.0f} MiB")
    found.add_row("most anonymous memory of all processes", f"{outcome.anonymous / MIB:.0f} MiB")
    for what, figure in outcome.figures.items():
        found.add_row(what, str(figure))
    for problem in outcome.problems:
        found.add_row("[red]problem", problem)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=15)
    length.add_argument("--hours", type=float)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("soak: needs root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("soak: ended"))  # and all that was started with it
    seconds = 60 * options.minutes if options.hours is None else 3600 * options.hours
    with tempfile.TemporaryDirectory(prefix="trimsfs-soak-", dir=SCRATCH) as name:
        directory = Path(name) / "soak"
        directory.mkdir()
        let_in(directory)
        outcome = soak(seconds, options.seed, directory)
        if outcome.problems:
            kept = SCRATCH / f"trimsfs-soak-{options.seed}.log"
            kept.write_bytes((Path(name) / "soak.log").read_bytes())
            outcome.problems.append(f"the log is {kept}")
    Console(width=140).print(table(outcome))
    sys.exit(bool(outcome.problems))


if __name__ == "__main__":
    main()
