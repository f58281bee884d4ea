"""Many processes that map one file at once."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import Child, TooSlowError, begin, measure
from tests.benchmarks.contenders import Contender
from tests.benchmarks.machine import settle
from tests.benchmarks.results import NATIVE

PROCESSES = "processes"
COLD, WARM = "cold: the last has every byte", "warm: the last has every byte"
FETCHED, IN_MEMORY, PSS = "bytes fetched / file", "page cache / file", "PSS of all / file"


def processes(bench: Bench) -> None:
    """Each number of processes over an empty cache, then again over a full one."""
    relative = bench.data.file(bench.scale.big)
    for count in bench.scale.processes:
        for contender in bench.contenders:
            names = [COLD, WARM, IN_MEMORY, PSS] + ([] if contender.name == NATIVE else [FETCHED])
            map_in = partial(_at_once, bench, contender, relative, count)
            bench.take(PROCESSES, case(count), contender.name, names, map_in)


def case(count: int) -> str:
    """How the tables name a number of processes."""
    return "1 process" if count == 1 else f"{count} processes"


def _at_once(bench: Bench, contender: Contender, relative: Path, count: int) -> Sequence[float]:
    size = bench.scale.big
    with bench.cold(contender, relative, bench.plain) as mount:
        cold_s, _, in_memory = map_in(mount.path / relative, count, bench.scale.timeout_s)
        settle()
        if contender.name != NATIVE:
            in_memory += measure("cached", mount.cache, bench.scale.timeout_s)["bytes"]
        warm_s, pss, _ = map_in(mount.path / relative, count, bench.scale.timeout_s)
        fetched = [] if contender.name == NATIVE else [bench.fetched(bench.plain, relative) / size]
    return [cold_s, warm_s, in_memory / size, pss / size, *fetched]


def map_in(path: Path, count: int, timeout_s: float) -> tuple[float, float, float]:
    """Seconds from the first process's open to the last one's last byte, and then in bytes: PSS of all, page cache."""
    deadline = time.monotonic() + timeout_s
    with ExitStack() as stack:
        readers = [stack.enter_context(Child("reader", "scan", path)) for _ in range(count)]
        begin(readers)
        try:
            outcomes = [reader.outcome(max(0, deadline - time.monotonic())) for reader in readers]
        except TooSlowError:
            raise TooSlowError(timeout_s) from None
        held = []
        for reader in readers:
            reader.tell()
            held.append(reader.outcome(timeout_s))
    seconds = max(outcome["ended"] for outcome in outcomes) - min(outcome["begun"] for outcome in outcomes)
    return seconds, sum(one["pss"] for one in held), held[0]["cached"]
