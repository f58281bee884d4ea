"""Cold: an empty cache and nothing fetched, natively nothing in memory."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import measure
from tests.benchmarks.contenders import Contender, trimsfs
from tests.benchmarks.measure.references import WHOLE, best_gets, gets, single_gets
from tests.benchmarks.results import TRIMSFS
from tests.benchmarks.scale import KIB, size_text
from tests.services.fast import FastS3

COLD, PROFILE = "cold", "cold, distant"
COLD_OPEN, COLD_OPEN_PROFILE = "cold open", "cold open, distant"
FIRST, SCAN = "first byte", "mapped, every byte"
MODES = ("wait", "stream", "auto")
SMALL = 32 * KIB
"""Bytes of a file that was read before where the mount is not to be one that nobody has used yet."""


def cold(bench: Bench) -> None:
    """The big file, from an endpoint that answers at once."""
    _cold_set(bench, COLD, bench.plain, bench.scale.big)


def distant(bench: Bench) -> None:
    """A smaller one, from an endpoint like a distant store."""
    _cold_set(bench, PROFILE, bench.profile, bench.scale.profile)


def _cold_set(bench: Bench, group: str, server: FastS3, size: int) -> None:
    relative = bench.data.file(size)
    case = size_text(size)
    for _ in range(bench.scale.cold_repetitions):
        for contender in bench.contenders:
            bench.take(group, case, contender.name, [FIRST, WHOLE], partial(read, bench, contender, server, relative))
        gets(bench, group, server, relative, size)
        for contender in bench.contenders:
            bench.take(group, case, contender.name, [SCAN], partial(_scan, bench, contender, server, relative))
        single_gets(bench, group, server, relative)
    best_gets(bench, group, size)


def cold_open(bench: Bench) -> None:
    """What an open of a file that is not here does, by the option ``--cold-open``."""
    for group, server in ((COLD_OPEN, bench.plain), (COLD_OPEN_PROFILE, bench.profile)):
        for size in bench.scale.cold_open_sizes:
            relative = bench.data.file(size)
            for _ in range(bench.scale.cold_repetitions):
                for mode in MODES:
                    contender = trimsfs(f"--cold-open={mode}", name=cold_open_name(mode))
                    measured = partial(read, bench, contender, server, relative, known=True)
                    bench.take(group, size_text(size), contender.name, [FIRST, WHOLE], measured)
        single_gets(bench, group, server, bench.data.file(max(bench.scale.cold_open_sizes)))


def cold_open_name(mode: str) -> str:
    """How the tables name trimsfs with that mode."""
    return f"{TRIMSFS}, {mode}"


def read(bench: Bench, contender: Contender, server: FastS3, relative: Path, *, known: bool = False) -> Sequence[float]:
    """Seconds until the first byte and until the last of a file that is not here; *known* if its name is."""
    with bench.cold(contender, relative, server) as mount:
        if known:
            measure("read", mount.path / bench.data.file(SMALL, "other"), bench.scale.timeout_s)
        outcome = measure("read", mount.path / relative, bench.scale.timeout_s, known=int(known))
    return [outcome["first_s"], outcome["seconds"]]


def _scan(bench: Bench, contender: Contender, server: FastS3, relative: Path) -> Sequence[float]:
    with bench.cold(contender, relative, server) as mount:
        return [measure("scan", mount.path / relative, bench.scale.timeout_s)["seconds"]]
