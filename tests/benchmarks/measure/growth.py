"""How costs grow: with the number of files, with the size of a directory, with the size of a file."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import measure
from tests.benchmarks.contenders import Contender
from tests.benchmarks.data import BUCKET
from tests.benchmarks.machine import own_memory_bytes, settle
from tests.benchmarks.results import NATIVE
from tests.benchmarks.scale import size_text

SMALL, DIRECTORIES, SIZES = "small files", "directories", "file sizes"
COLD, WARM = "cold", "warm"
THREADS = (1, 8)
LISTING, LOOKUP, SERVER = "list and stat all, cold", "one lookup", "server memory"
ENTRY_SIZE = 16
LOOKUPS = 10


def small_files(bench: Bench) -> None:
    """All files of a directory, read in order of name, by one thread and by several."""
    scale = bench.scale
    relative = bench.data.directory(scale.small_files, scale.small_size)
    for threads in THREADS:
        case = f"{scale.small_files} of {size_text(scale.small_size)}, threads: {threads}"
        for _ in range(scale.cold_repetitions):
            for contender in bench.contenders:
                read = partial(_twice, bench, contender, relative, "files", threads=threads)
                bench.take(SMALL, case, contender.name, [COLD, WARM], read)


def sizes(bench: Bench) -> None:
    """One file of each size."""
    for size in bench.scale.sizes:
        relative = bench.data.file(size)
        for contender in bench.contenders:
            read = partial(_twice, bench, contender, relative, "read")
            bench.take(SIZES, size_text(size), contender.name, [COLD, WARM], read)


def directories(bench: Bench) -> None:
    """A directory of each number of objects: listed, then one name looked up that the kernel has forgotten."""
    for count in bench.scale.directories:
        relative = bench.data.directory(count, ENTRY_SIZE)
        with closing(bench.plain.client()) as client:
            # So that the endpoint has its own listing ready for whoever is first.
            client.list_objects_v2(Bucket=BUCKET, Prefix=f"{relative}/", Delimiter="/", MaxKeys=1)
        for contender in bench.contenders:
            names = [LISTING, LOOKUP] + ([] if contender.name == NATIVE else [SERVER])
            bench.take(DIRECTORIES, f"{count:,}", contender.name, names, partial(_list, bench, contender, relative))


def _twice(bench: Bench, contender: Contender, relative: Path, action: str, **options: int) -> Sequence[float]:
    with bench.cold(contender, relative, bench.plain) as mount:
        cold = measure(action, mount.path / relative, bench.scale.timeout_s, **options)
        settle()
        warm = measure(action, mount.path / relative, bench.scale.timeout_s, **options)
    return [cold["seconds"], warm["seconds"]]


def _list(bench: Bench, contender: Contender, relative: Path) -> Sequence[float]:
    with bench.mounted(contender, bench.plain) as mount:
        listed = measure("listing", mount.path / relative, bench.scale.timeout_s)
        memory = own_memory_bytes(mount.pids, mount.cache)
        last = max(path.name for path in (bench.data.native / relative).iterdir())
        looked_up = measure("lookups", mount.path / relative / last, bench.scale.timeout_s, count=LOOKUPS)
    return [listed["seconds"], looked_up["p50"], *([memory] if mount.pids else [])]
