"""The first load of each case, by each contender, from each endpoint."""

import os
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import Child
from tests.benchmarks.machine import cpu_s
from tests.benchmarks.models.cases import FILE, Case, chosen
from tests.benchmarks.models.machine import COMPUTING_FOR_EACH_CORE, Computing, busy_s, computing, wait_quiet
from tests.benchmarks.models.places import BUSY_HTTPS, HTTPS, Place
from tests.benchmarks.models.ways import DOWNLOADS, Way, ways
from tests.benchmarks.results import NATIVE
from tests.benchmarks.scale import GIB

GROUP = "models, "
DOWNLOAD, LOAD, INFER, SUM = "download", "load", "first inference", "cold, sum"
CPU, CPU_AFTER = "processor time of the machine", "processor time with what follows"
CPU_OWN, CPU_PER_GIB = "processor time without the server's", "processor time without the server's, a GiB"
RATE, LOST = "rate of what computes / alone", "work that computing programs lost"
WARM = "warm, sum"
ALONE_S = 1.5
"""So long programs compute alone before a load."""


@dataclass(frozen=True, slots=True)
class Selection:
    """What of this part is measured: short names of programs and places, names of contenders; none are all."""

    programs: Collection[str] = ()
    places: Collection[str] = ()
    contenders: Collection[str] = ()


def group(place: str) -> str:
    """How the tables name the measurements at a place."""
    return GROUP + place


@dataclass(frozen=True, slots=True)
class Meter:
    """What has been spent so far: seconds of the clock and of processors, and units of work that others have done."""

    at_s: float
    machine_s: float
    server_s: float
    units: int

    @classmethod
    def read(cls, place: Place, beside: Computing) -> "Meter":
        """Now. What programs beside it compute is not the machine's."""
        return cls(time.perf_counter(), busy_s() - beside.cpu_s, cpu_s(place.server.pids), beside.units)

    def rate(self, since: "Meter") -> float:
        """Units a second."""
        return (self.units - since.units) / (self.at_s - since.at_s)


@dataclass(slots=True)
class Loads:
    """Measures; the digest of what each case gave first is what all others are held to."""

    bench: Bench
    selection: Selection
    _digests: dict[str, str] = field(default_factory=dict)

    def measure(self, places: Sequence[Place]) -> None:
        """All that is selected. Contenders take turns, in each round another one is the first."""
        wanted = self.selection.contenders
        contenders = [way for way in ways(self.bench) if not wanted or way.name in wanted]
        for case in chosen(self.bench, self.selection.programs):
            able = [way for way in contenders if case.streamed or not way.streams]
            for place in places:
                # What was asked for by its name is measured wherever it was asked for.
                if not (place.name in case.places or self.selection.places):
                    continue
                # Local files are the same from everywhere.
                here = [way for way in able if way.name != NATIVE or place.name in {HTTPS, BUSY_HTTPS}]
                for turn in range(self.bench.scale.model_repetitions):
                    first = turn % max(1, len(here))
                    for way in (*here[first:], *here[:first]):
                        names = _names(case, place, way)
                        load = partial(self._load, case, place, way, names)
                        self.bench.take(group(place.name), case.name, way.name, names, load)

    def _load(self, case: Case, place: Place, way: Way, names: Sequence[str]) -> Sequence[float]:
        scale = self.bench.scale
        with ExitStack() as stack:
            directory = stack.enter_context(self.bench.directory())
            way.offer(place, case.directory)
            child = stack.enter_context(way.child(case, place))
            child.wait_ready()
            fetch = stack.enter_context(way.ready(directory, place, case.directory))
            beside = stack.enter_context(ExitStack())
            others = beside.enter_context(computing(COMPUTING_FOR_EACH_CORE * _cores() if place.busy else 0))
            wait_quiet(scale.quiet_s)
            self.bench.touch(Path(case.directory))
            others.begin()
            alone = Meter.read(place, others)
            time.sleep(ALONE_S if place.busy else 0)
            begun = Meter.read(place, others)
            path = fetch()
            fetched_s = time.perf_counter() - begun.at_s
            outcome = self._told(child, case, path)
            ended = Meter.read(place, others)
            beside.close()
            total_s = fetched_s + _sum(outcome)
            machine_s, server_s = ended.machine_s - begun.machine_s, ended.server_s - begun.server_s
            samples = {
                DOWNLOAD: fetched_s,
                LOAD: outcome["load_s"],
                SUM: total_s,
                CPU: machine_s,
                CPU_OWN: machine_s - server_s,
                CPU_PER_GIB: (machine_s - server_s) * GIB / scale.file,
            }
            if case.infers:
                samples[INFER] = outcome["infer_s"]
            if place.busy:
                samples[RATE] = ended.rate(begun) / begun.rate(alone)
                samples[LOST] = (1 - samples[RATE]) * total_s
            else:
                wait_quiet(scale.quiet_s)
                samples[CPU_AFTER] = busy_s() - begun.machine_s
            if WARM in names:
                again = stack.enter_context(way.child(case, place))
                again.wait_ready()
                samples[WARM] = _sum(self._told(again, case, path))
        return [samples[name] for name in names]

    def _told(self, child: Child, case: Case, path: object) -> dict[str, float]:
        """What a program says of a load. Raises ValueError when something else came out than before."""
        child.tell(str(path))
        outcome = child.outcome(self.bench.scale.model_timeout_s)
        digest = outcome.pop("digest")
        if self._digests.setdefault(case.name, digest) != digest:
            raise ValueError(f"{case.name}: another output, {digest}")
        return outcome


def _names(case: Case, place: Place, way: Way) -> list[str]:
    """What is measured of a load."""
    names = [DOWNLOAD] if way.name in DOWNLOADS else []
    names += [LOAD, INFER] if case.infers else []
    names += [SUM, CPU, CPU_OWN]
    names += [CPU_PER_GIB] if case.directory == FILE else []
    names += [RATE, LOST] if place.busy else [CPU_AFTER]
    return names + ([WARM] if way.mounts and not place.busy else [])


def _sum(outcome: dict[str, float]) -> float:
    return outcome["load_s"] + outcome.get("infer_s", 0)


def _cores() -> int:
    return os.cpu_count() or 1
