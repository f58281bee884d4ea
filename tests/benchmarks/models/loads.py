"""The first load of each case, by each contender, from each endpoint."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import Child
from tests.benchmarks.models.cases import Case, chosen
from tests.benchmarks.models.machine import LowWater, busy_s, wait_quiet
from tests.benchmarks.models.places import Place
from tests.benchmarks.models.ways import DOWNLOADS, Way, ways

GROUP = "models, "
DOWNLOAD, LOAD, INFER, SUM = "download", "load", "first inference", "cold, sum"
CPU, CPU_AFTER = "processor time of the machine", "processor time with what follows"
MEMORY, WARM = "less MemAvailable", "warm, sum"


@dataclass(frozen=True, slots=True)
class Selection:
    """What of this part is measured: short names of programs and places, names of contenders; none are all."""

    programs: frozenset[str] = frozenset()
    places: frozenset[str] = frozenset()
    contenders: frozenset[str] = frozenset()


def group(place: str) -> str:
    """How the tables name the measurements at a place."""
    return GROUP + place


@dataclass(slots=True)
class Loads:
    """Measures; the digest of what each case gave first is what all others are held to."""

    bench: Bench
    selection: Selection
    _digests: dict[str, str] = field(default_factory=dict)

    def measure(self, places: Sequence[Place]) -> None:
        """All that is selected. Contenders take turns, in each round another one is the first."""
        contenders = [
            way for way in ways(self.bench) if not self.selection.contenders or way.name in self.selection.contenders
        ]
        for case in chosen(self.bench, self.selection.programs):
            for place in places:
                # What was asked for by its name is measured wherever it was asked for.
                if not (case.everywhere or place.main or self.selection.places):
                    continue
                for turn in range(self.bench.scale.model_repetitions):
                    first = turn % len(contenders)
                    for way in (*contenders[first:], *contenders[:first]):
                        self._take(case, place, way)

    def _take(self, case: Case, place: Place, way: Way) -> None:
        names = [DOWNLOAD] if way.name in DOWNLOADS else []
        names += [LOAD, INFER] if case.infers else []
        names += [SUM, CPU, CPU_AFTER, MEMORY] + ([WARM] if way.mounts else [])
        self.bench.take(group(place.name), case.name, way.name, names, partial(self._load, case, place, way))

    def _load(self, case: Case, place: Place, way: Way) -> Sequence[float]:
        scale = self.bench.scale
        with ExitStack() as stack:
            directory = stack.enter_context(self.bench.directory())
            way.offer(place, case.directory)
            child = stack.enter_context(case.child())
            child.wait_ready()
            memory = stack.enter_context(LowWater())
            fetch = stack.enter_context(way.ready(directory, place, case.directory))
            wait_quiet(scale.quiet_s)
            busy, begun = busy_s(), time.perf_counter()
            path = fetch()
            fetched_s = time.perf_counter() - begun
            outcome = self._told(child, case, path)
            times = [outcome["load_s"], outcome["infer_s"]] if case.infers else []
            cpu_s, taken = busy_s() - busy, memory.taken
            wait_quiet(scale.quiet_s)
            samples = [fetched_s] if way.name in DOWNLOADS else []
            samples += [*times, fetched_s + _sum(outcome), cpu_s, busy_s() - busy, taken]
            if way.mounts:
                again = stack.enter_context(case.child())
                again.wait_ready()
                samples.append(_sum(self._told(again, case, path)))
        return samples

    def _told(self, child: Child, case: Case, path: object) -> dict[str, float]:
        """What a program says of a load. Raises ValueError when something else came out than before."""
        child.tell(str(path))
        outcome = child.answer(self.bench.scale.model_timeout_s)
        digest = outcome.pop("digest")
        if self._digests.setdefault(case.name, digest) != digest:
            raise ValueError(f"{case.name}: another output, {digest}")
        return outcome


def _sum(outcome: dict[str, float]) -> float:
    return outcome["load_s"] + outcome.get("infer_s", 0)
