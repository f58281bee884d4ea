"""What the servers cost, what a remount costs, and whom a fetch holds up."""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import Child, measure
from tests.benchmarks.contenders import Contender, trimsfs
from tests.benchmarks.machine import Cost, settle
from tests.benchmarks.results import TRIMSFS
from tests.benchmarks.scale import GIB, KIB, size_text

COST, REMOUNT, BUSY = "server cost", "remount", "open during a fetch"
CPU, CPU_PER_GIB, PEAK = "CPU time", "CPU time per GiB", "peak memory"
MOUNT, AFTER, FETCHED = "mount command", "first read after it", "bytes fetched / file"
RESIDENT = "open and close of another file"
PERCENTILES = ("p50", "p99", "max")
GAP_S = 0.001


def cost(bench: Bench) -> None:
    """CPU and memory of the server's processes while the big file is read for the first time."""
    relative = bench.data.file(bench.scale.big)
    for contender in bench.servers:
        names = [CPU, CPU_PER_GIB, PEAK]
        bench.take(COST, _case(bench), contender.name, names, partial(_cost, bench, contender, relative))


def remount(bench: Bench) -> None:
    """Mounted again over the cache that an earlier mount has filled."""
    relative = bench.data.file(bench.scale.big)
    for _ in range(bench.scale.cold_repetitions):
        for contender in bench.servers:
            names = [MOUNT, AFTER, FETCHED]
            bench.take(REMOUNT, _case(bench), contender.name, names, partial(_remount, bench, contender, relative))


def busy(bench: Bench) -> None:
    """Opens of a resident file while another is fetched at full speed; trimsfs only."""
    relative = bench.data.file(bench.scale.big)
    resident = bench.data.file(32 * KIB, "resident")
    names = [f"{RESIDENT}, {part}" for part in PERCENTILES]
    for _ in range(bench.scale.cold_repetitions):
        bench.take(BUSY, _case(bench), TRIMSFS, names, partial(_busy, bench, relative, resident))


def _case(bench: Bench) -> str:
    return size_text(bench.scale.big)


def _cost(bench: Bench, contender: Contender, relative: Path) -> Sequence[float]:
    with bench.cold(contender, relative, bench.plain) as mount, Cost(mount) as cost:
        measure("read", mount.path / relative, bench.scale.timeout_s)
        # What a server still does after the last byte counts too.
        settle()
    return [cost.cpu_s, cost.cpu_s * GIB / bench.scale.big, cost.peak_bytes]


def _remount(bench: Bench, contender: Contender, relative: Path) -> Sequence[float]:
    bench.data.heat(relative)
    with bench.directory() as directory:
        with contender.mount(directory, bench.plain) as mount:
            measure("read", mount.path / relative, bench.scale.timeout_s)
            settle()
        bench.plain.reset()
        begun = time.monotonic()
        with contender.mount(directory, bench.plain) as mount:
            mounted_s = time.monotonic() - begun
            outcome = measure("read", mount.path / relative, bench.scale.timeout_s)
            fetched = bench.fetched(bench.plain, relative)
    return [mounted_s, outcome["seconds"], fetched / bench.scale.big]


def _busy(bench: Bench, relative: Path, resident: Path) -> Sequence[float]:
    timeout_s = bench.scale.timeout_s
    with bench.cold(trimsfs(), relative, bench.plain) as mount:
        measure("read", mount.path / resident, timeout_s)
        settle()
        with Child("reader", "opens_until_told", mount.path / resident, sleep_s=GAP_S) as opener:
            opener.wait_ready()
            with Child("reader", "read", mount.path / relative) as reader:
                reader.wait_ready()
                opener.tell()
                reader.tell()
                reader.outcome(timeout_s)
            opener.tell()
            outcome = opener.outcome(timeout_s)
    return [outcome[part] for part in PERCENTILES]
