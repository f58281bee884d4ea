"""Parts of a large file: its header, a few pages of it; and what the wire does, which both are beside."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import Child, measure
from tests.benchmarks.data import BUCKET
from tests.benchmarks.models.cases import FILE, LLAMA, SPARSE, Case, written
from tests.benchmarks.models.loads import Selection, group
from tests.benchmarks.models.machine import wait_quiet
from tests.benchmarks.models.places import Place
from tests.benchmarks.models.ways import Way, ways
from tests.benchmarks.results import GETS
from tests.benchmarks.scale import size_text
from tests.services import S3Server
from tests.services.fast import LISTINGS, FastS3

HEADER = Case(name="", short="header", directory=FILE, program="header", infers=True)
FIRST, WHOLE_HEADER = "open and 8 bytes", "open, 8 bytes and the header"
PAGES, FETCHED = "4 KiB at random", "bytes fetched"
P50, P99 = f"{PAGES}, p50", f"{PAGES}, p99"
WIRE = "bytes on the wire"
READS = 200
WORKERS = (4, 8, 16)


def partial_reads(bench: Bench, selection: Selection, places: Sequence[Place]) -> None:
    """All that is selected."""
    mounts = [
        way for way in ways(bench) if way.mounts and (not selection.contenders or way.name in selection.contenders)
    ]
    chosen = selection.programs
    for place in places:
        for _ in range(bench.scale.model_repetitions):
            if not chosen or "llama" in chosen:
                _wire(bench, place)
            if (not chosen or "header" in chosen) and (place.main or selection.places):
                _headers(bench, place, mounts)
            if (not chosen or "random" in chosen) and isinstance(place.server, FastS3):
                _pages(bench, place, place.server, mounts)


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
    file = written(bench, FILE) / "model.safetensors"
    with file.open("rb") as opened:
        length = 8 + int.from_bytes(opened.read(8), "little")
    case = f"file of {size_text(file.stat().st_size)}"

    def one_get() -> Sequence[float]:
        place.offer(bench.data.store, Path(BUCKET, FILE))
        return [_gets(bench, place.server, f"{FILE}/{file.name}", length, 1)]

    for way in mounts:
        names = [FIRST, WHOLE_HEADER]
        bench.take(group(place.name), case, way.name, names, partial(_header, bench, place, way))
    bench.take(group(place.name), case, GETS, [WHOLE_HEADER], one_get)


def _header(bench: Bench, place: Place, way: Way) -> Sequence[float]:
    with ExitStack() as stack:
        directory = stack.enter_context(bench.directory())
        way.offer(place, FILE)
        child = stack.enter_context(HEADER.child())
        child.wait_ready()
        fetch = stack.enter_context(way.ready(directory, place, FILE))
        wait_quiet(bench.scale.quiet_s)
        child.tell(fetch())
        outcome = child.answer(bench.scale.model_timeout_s)
    return [outcome["load_s"], outcome["load_s"] + outcome["infer_s"]]


def _pages(bench: Bench, place: Place, server: FastS3, mounts: Sequence[Way]) -> None:
    case = f"{READS} in {size_text(bench.scale.sparse)}"
    for way in mounts:
        names = [P50, P99, FETCHED]
        bench.take(group(place.name), case, way.name, names, partial(_page, bench, place, server, way))


def _page(bench: Bench, place: Place, server: FastS3, way: Way) -> Sequence[float]:
    with ExitStack() as stack:
        directory = stack.enter_context(bench.directory())
        way.offer(place, SPARSE)
        path = stack.enter_context(way.ready(directory, place, SPARSE))()
        wait_quiet(bench.scale.quiet_s)
        server.reset()
        outcome = measure("randoms", path / "model.bin", bench.scale.model_timeout_s, count=READS)
        wait_quiet(bench.scale.quiet_s)  # what is still fetched when the program has ended counts too
        counted = server.statistics().items()
    return [outcome["p50"], outcome["p99"], sum(each.body_bytes for name, each in counted if LISTINGS not in name)]


def _gets(bench: Bench, server: S3Server, key: str, size: int, workers: int) -> float:
    """Seconds of so many plain GETs at once, each of the first *size* bytes of an object."""
    with closing(server.client()) as client:
        url = client.generate_presigned_url("get_object", Params={"Bucket": BUCKET, "Key": key})
    with Child("models.programs.gets", url, size=size, workers=workers) as child:
        child.wait_ready()
        child.tell()
        return child.outcome(bench.scale.model_timeout_s)["seconds"]
