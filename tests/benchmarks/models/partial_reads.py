"""Parts of a large file: its first bytes and header, a few pages of it; and what the wire does."""

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import Child, measure
from tests.benchmarks.data import BUCKET
from tests.benchmarks.juicefs import BUCKET as JUICEFS_BUCKET
from tests.benchmarks.models import cases
from tests.benchmarks.models.cases import FILE, LLAMA, SHARDS, Case, written
from tests.benchmarks.models.loads import Selection, group
from tests.benchmarks.models.machine import wait_quiet
from tests.benchmarks.models.places import DISTANT, HTTPS, SLOW, Place
from tests.benchmarks.models.ways import Way, ways
from tests.benchmarks.results import GETS
from tests.benchmarks.scale import size_text
from tests.services import S3Server

HEADER = Case("", cases.HEADER, SHARDS, "header", infers=True)
READER = Case("", cases.HEADER, SHARDS, "read_files")
FIRST, WHOLE_HEADER = "open and 8 bytes", "open, 8 bytes and the header"
BESIDE = "open and 8 bytes, while the model is fetched"
PAGES, FETCHED = "4 KiB at random", "bytes fetched"
P50, P99 = f"{PAGES}, p50", f"{PAGES}, p99"
WIRE = "bytes on the wire"
READS = 200
WORKERS = (4, 8, 16)
UNDER_WAY_S = 2
"""So long the first shard has been read when the header of the last one is."""


def partial_reads(bench: Bench, selection: Selection, places: Sequence[Place]) -> None:
    """All that is selected."""
    mounts = [
        way for way in ways(bench) if way.mounts and (not selection.contenders or way.name in selection.contenders)
    ]
    chosen = selection.programs

    def wanted(program: str, place: Place, *where: str) -> bool:
        return (not chosen or program in chosen) and (place.name in where or bool(selection.places))

    for place in places:
        for _ in range(bench.scale.model_repetitions):
            if wanted("llama", place) and place.name == DISTANT:
                _wire(bench, place)
            if wanted(cases.HEADER, place, HTTPS, DISTANT, SLOW):
                _headers(bench, place, mounts)
            if wanted(cases.RANDOM, place, DISTANT):
                _pages(bench, place, mounts)


def _wire(bench: Bench, place: Place) -> None:
    """The bytes of the Llama at the best rate of plain parallel GETs, each of a whole shard."""

    def fastest() -> Sequence[float]:
        files = sorted(written(bench, "llama").glob("*.safetensors"))
        place.offer(bench.data.store, Path(BUCKET, "llama"))
        largest = max(files, key=lambda path: path.stat().st_size)
        size, whole = largest.stat().st_size, sum(path.stat().st_size for path in files)
        key = f"llama/{largest.name}"
        rates = [workers * size / _gets(bench, place.server, key, size, workers) for workers in WORKERS]
        return [whole / max(rates)]

    bench.take(group(place.name), LLAMA, GETS, [WIRE], fastest)


def _headers(bench: Bench, place: Place, mounts: Sequence[Way]) -> None:
    file = written(bench, SHARDS) / cases.shard(cases.COUNT - 1)
    with file.open("rb") as opened:
        length = 8 + int.from_bytes(opened.read(8), "little")
    case = f"shard of {size_text(bench.scale.shard)}"

    def one_get() -> Sequence[float]:
        place.offer(bench.data.store, Path(BUCKET, SHARDS))
        return [_gets(bench, place.server, f"{SHARDS}/{file.name}", length, 1)]

    for way in mounts:
        alone = partial(_header, bench, place, way, file.name)
        bench.take(group(place.name), case, way.name, [FIRST, WHOLE_HEADER], alone)
        if place.name == SLOW:
            beside = partial(_header, bench, place, way, file.name, beside=True)
            bench.take(group(place.name), case, way.name, [BESIDE, f"{BESIDE}, and the header"], beside)
    bench.take(group(place.name), case, GETS, [WHOLE_HEADER], one_get)


def _header(bench: Bench, place: Place, way: Way, name: str, *, beside: bool = False) -> Sequence[float]:
    """Seconds to the first bytes of a shard and to its whole header, if *beside* while another shard is being read."""
    with ExitStack() as stack:
        directory = stack.enter_context(bench.directory())
        way.offer(place, SHARDS)
        path = Path(stack.enter_context(way.ready(directory, place, SHARDS))())
        child, reader = (stack.enter_context(case.child()) for case in (HEADER, READER))
        for each in (child, reader):
            each.wait_ready()
        wait_quiet(bench.scale.quiet_s)
        bench.touch(Path(SHARDS))
        if beside:
            reader.tell(path)
            time.sleep(UNDER_WAY_S)
        child.tell(path / name)
        outcome = child.outcome(bench.scale.model_timeout_s)
    return [outcome["load_s"], outcome["load_s"] + outcome["infer_s"]]


def _pages(bench: Bench, place: Place, mounts: Sequence[Way]) -> None:
    case = f"{READS} in {size_text(bench.scale.file)}"
    for way in mounts:
        names = [P50, P99, FETCHED]
        bench.take(group(place.name), case, way.name, names, partial(_page, bench, place, way))


def _page(bench: Bench, place: Place, way: Way) -> Sequence[float]:
    with ExitStack() as stack:
        directory = stack.enter_context(bench.directory())
        way.offer(place, FILE)
        path = Path(stack.enter_context(way.ready(directory, place, FILE))())
        wait_quiet(bench.scale.quiet_s)
        bench.touch(Path(FILE))
        before = _sent(place)
        outcome = measure("randoms", path / "model.safetensors", bench.scale.model_timeout_s, count=READS)
        wait_quiet(bench.scale.quiet_s)  # what is still fetched when the program has ended counts too
        sent = _sent(place) - before
    return [outcome["p50"], outcome["p99"], sent]


def _sent(place: Place) -> float:
    """Bytes of bodies that the server has sent to whoever it was."""
    return sum(map(place.source.sent_bytes, (BUCKET, JUICEFS_BUCKET)))


def _gets(bench: Bench, server: S3Server, key: str, size: int, workers: int) -> float:
    """Seconds of so many plain GETs at once, each of the first *size* bytes of an object."""
    with closing(server.client()) as client:
        url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key})
    child = Child("models.programs.gets", url, environment=server.environment(), size=size, workers=workers)
    seconds: float = child.run(bench.scale.model_timeout_s)["seconds"]
    return seconds
