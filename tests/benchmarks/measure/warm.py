"""Warm: everything was read once and closed."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import measure
from tests.benchmarks.contenders import Contender
from tests.benchmarks.machine import settle
from tests.benchmarks.results import PEERS
from tests.benchmarks.scale import size_text

WARM = "warm"
BEFORE, READ = "first read, not warm", "read"
TOUCH, SCAN = "open file mapped, every page entered", "mapped, every byte"
OPEN, OPEN_IDLE = "open and close", "open and close, 2 ms apart"
STAT, FSTAT, RANDOM = "stat", "fstat", "4 KiB at random"
P50, P99 = ", p50", ", p99"
IDLE_S = 0.002
TURNS = 3
"""How often a native file and trimsfs take turns where the slower ones measure once: they are close to each other."""
_WHOLE = {TOUCH: "touch", SCAN: "scan", READ: "preads"}
_OPERATIONS = {OPEN: "opens", STAT: "stats", FSTAT: "fstats", RANDOM: "randoms"}


def warm(bench: Bench) -> None:
    """The big file. All contenders are mounted at once and take turns."""
    scale = bench.scale
    relative = bench.data.file(scale.big)
    case = size_text(scale.big)
    with ExitStack() as stack:
        paths: dict[str, Path] = {}
        for contender in bench.contenders:
            prepare = partial(_prepare, bench, contender, relative, stack, paths)
            bench.take(WARM, case, contender.name, [BEFORE], prepare)
        settle()
        for _ in range(scale.warm_repetitions):
            for name, action in _WHOLE.items():
                for turn in range(TURNS):
                    for contender_name, path in paths.items():
                        if turn == 0 or contender_name not in PEERS:
                            bench.take(WARM, case, contender_name, [name], partial(_whole, bench, action, path))
            for name, action in _OPERATIONS.items():
                for contender_name, path in paths.items():
                    operate = partial(_operations, bench, action, path, scale.operations, 0)
                    bench.take(WARM, case, contender_name, [name + P50, name + P99], operate)
            for contender_name, path in paths.items():
                operate = partial(_operations, bench, "opens", path, scale.idle_operations, IDLE_S)
                bench.take(WARM, case, contender_name, [OPEN_IDLE + P50, OPEN_IDLE + P99], operate)


def _prepare(
    bench: Bench, contender: Contender, relative: Path, stack: ExitStack, paths: dict[str, Path]
) -> Sequence[float]:
    mount = stack.enter_context(bench.cold(contender, relative, bench.plain))
    path = mount.path / relative
    seconds = measure("read", path, bench.scale.timeout_s)["seconds"]
    paths[contender.name] = path
    return [seconds]


def _whole(bench: Bench, action: str, path: Path) -> Sequence[float]:
    return [measure(action, path, bench.scale.timeout_s)["seconds"]]


def _operations(bench: Bench, action: str, path: Path, count: int, sleep_s: float) -> Sequence[float]:
    outcome = measure(action, path, bench.scale.timeout_s, count=count, sleep_s=sleep_s)
    return [outcome["p50"], outcome["p99"]]
