"""What the ways of fetching cost, and how long each holds an event loop beside it up."""

import filecmp
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import Child
from tests.benchmarks.data import BUCKET
from tests.benchmarks.scale import size_text
from tests.benchmarks.ways import WAYS

FETCHING = "ways to fetch"
WHOLE, CPU, LATE = "whole object into a file", "CPU time", "event loop late, p99"


def ways(bench: Bench) -> None:
    """The big file, each way."""
    relative = bench.data.file(bench.scale.big)
    for _ in range(bench.scale.cold_repetitions):
        for way in WAYS:
            fetch = partial(_fetch, bench, way, relative)
            bench.take(FETCHING, size_text(bench.scale.big), way, [WHOLE, CPU, LATE], fetch)


def _fetch(bench: Bench, way: str, relative: Path) -> Sequence[float]:
    bench.data.heat(relative)
    size = bench.scale.big
    with bench.directory() as directory:
        target = directory / "target"
        with target.open("wb") as file:
            file.truncate(size)
        child = Child("ways", way, bench.plain.endpoint_url, BUCKET, relative, target=target, size=size)
        outcome = child.run(bench.scale.timeout_s)
        if not filecmp.cmp(target, bench.data.native / relative, shallow=False):
            raise ValueError(f"{way}: wrong bytes")
    return [outcome["seconds"], outcome["cpu_s"], outcome["late_p99"]]
