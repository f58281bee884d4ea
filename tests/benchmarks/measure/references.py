"""What any file system over S3 can at best do here: plain GETs by boto3 at the same endpoint."""

import os
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import Child, begin
from tests.benchmarks.data import BUCKET
from tests.benchmarks.results import GETS, Key
from tests.benchmarks.scale import KIB, MIB, size_text
from tests.services.fast import FastS3

PART = 8 * MIB
AT_ONCE = (4, 8)
SINGLE = (PART, 128 * KIB)
WHOLE = "whole read"
ONE_FIRST, ONE_LAST = "one GET, first byte", "one GET, last byte"


def gets(bench: Bench, group: str, server: FastS3, relative: Path, size: int) -> None:
    """The whole object by ranged GETs of 8 MiB into one fresh file: the least any cache must do."""
    for at_once in AT_ONCE:
        measure = partial(_fill, bench, server, relative, size, at_once)
        bench.take(group, size_text(size), GETS, [_name(at_once)], measure)


def best_gets(bench: Bench, group: str, size: int) -> None:
    """Take over the faster number of processes as the reference of the whole read."""
    case = size_text(size)
    keys = [Key(group, _name(at_once), case, GETS) for at_once in AT_ONCE]
    done = [bench.results.series[key].samples for key in keys if bench.results.series[key].samples]
    if done:
        bench.results.add(Key(group, WHOLE, case, GETS), *min(done, key=statistics.median))


def single_gets(bench: Bench, group: str, server: FastS3, relative: Path) -> None:
    """One GET over a connection that is there."""
    for length in SINGLE:
        measure = partial(_single, bench, server, relative, length)
        bench.take(group, size_text(length), GETS, [ONE_FIRST, ONE_LAST], measure)


def _name(at_once: int) -> str:
    return f"{WHOLE} by {at_once} processes"


def _fill(bench: Bench, server: FastS3, relative: Path, size: int, at_once: int) -> Sequence[float]:
    bench.data.heat(relative)
    with bench.directory() as directory, ExitStack() as stack:
        target = directory / "target"
        target.touch()
        os.truncate(target, size)
        workers = [
            stack.enter_context(_getter(server, relative, size, PART, target=target, worker=number, workers=at_once))
            for number in range(at_once)
        ]
        begin(workers)
        outcomes = [worker.outcome(bench.scale.timeout_s) for worker in workers]
    return [max(outcome["ended"] for outcome in outcomes) - min(outcome["begun"] for outcome in outcomes)]


def _single(bench: Bench, server: FastS3, relative: Path, length: int) -> Sequence[float]:
    bench.data.heat(relative)
    size = bench.data.size(relative)
    outcome = _getter(server, relative, size, min(length, size)).run(bench.scale.timeout_s)
    return [outcome["first_s"], outcome["last_s"]]


def _getter(server: FastS3, relative: Path, size: int, length: int, **options: Any) -> Child:
    return Child("getter", server.endpoint_url, BUCKET, relative, size=size, length=length, **options)
