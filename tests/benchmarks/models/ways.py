"""The contenders: how a program gets at the files of a directory of the bucket."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.bench import Bench
from tests.benchmarks.children import Child
from tests.benchmarks.contenders import RCLONE_MOUNT, S3FS_MOUNT, Contender, inherited, rclone_environment, trimsfs
from tests.benchmarks.data import BUCKET
from tests.benchmarks.juicefs import BUCKET as JUICEFS_BUCKET
from tests.benchmarks.juicefs import Volume, juicefs, volume
from tests.benchmarks.models.cases import Case, written
from tests.benchmarks.models.places import Place
from tests.benchmarks.results import JUICEFS, NATIVE, RCLONE, RUNAI, S3FS, TRIMSFS
from tests.services import installed, run_tool

BOTO3, RCLONE_COPY = "boto3 download", "rclone copy"
DOWNLOADS = (BOTO3, RCLONE_COPY)

WAYS = (NATIVE, BOTO3, RCLONE_COPY, TRIMSFS, RCLONE, JUICEFS, S3FS, RUNAI)
"""The names of all, in the order of the tables."""
STREAMER = {"RUNAI_STREAMER_CONCURRENCY": "16", "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0"}

Fetch = Callable[[], Path | str]
"""Called when the time runs: does what has to be done before a program can open the files, and says where they are."""
Ready = Callable[[Path, Place, str], AbstractContextManager[Fetch]]


@dataclass(frozen=True, slots=True)
class Way:
    """``offer(place, name)`` has the bucket's directory *name* at the endpoint, in memory.

    ``ready(directory, place, name)`` is all that a user does long before: mounting, say. What the contender keeps is in
    *directory*. One that *streams* has no files: programs read the bucket by a library.
    """

    name: str
    offer: Callable[[Place, str], None]
    ready: Ready
    mounts: bool = False
    streams: bool = False

    def child(self, case: Case, place: Place) -> Child:
        """The program of a case, as it loads this way. Raises MissingError."""
        return case.child(place.server.environment() | STREAMER if self.streams else None)


def ways(bench: Bench) -> list[Way]:
    """All, in the order of the tables."""
    volumes: dict[str, Volume] = {}

    def offer(place: Place, name: str) -> None:
        written(bench, name)
        place.offer(bench.data.store, Path(BUCKET, name))

    def offer_volume(place: Place, name: str) -> None:
        if name not in volumes:
            volumes[name] = volume(written(bench, name), bench.data.store, bench.work)
        place.offer(bench.data.store, Path(JUICEFS_BUCKET, name))

    return [
        Way(NATIVE, lambda _place, name: bench.data.heat(written(bench, name)), _local(bench)),
        Way(BOTO3, offer, _boto3(bench.scale.model_timeout_s)),
        Way(RCLONE_COPY, offer, _rclone_copy(bench.scale.model_timeout_s)),
        *(Way(each.name, offer, _mount(each), mounts=True) for each in (trimsfs(), RCLONE_MOUNT)),
        Way(JUICEFS, offer_volume, _juicefs(volumes), mounts=True),
        Way(S3FS_MOUNT.name, offer, _mount(S3FS_MOUNT), mounts=True),
        Way(RUNAI, offer, _streamed, streams=True),
    ]


@contextmanager
def _streamed(_directory: Path, _place: Place, name: str) -> Iterator[Fetch]:
    yield lambda: f"s3://{BUCKET}/{name}"


def _local(bench: Bench) -> Ready:
    @contextmanager
    def ready(_directory: Path, _place: Place, name: str) -> Iterator[Fetch]:
        yield lambda: bench.data.store / BUCKET / name

    return ready


def _boto3(timeout_s: float) -> Ready:
    @contextmanager
    def ready(directory: Path, place: Place, name: str) -> Iterator[Fetch]:
        target = directory / "downloaded"
        target.mkdir()
        with Child("models.programs.download", BUCKET, name, environment=place.server.environment()) as child:
            child.wait_ready()

            def fetch() -> Path:
                child.tell(target)
                child.outcome(timeout_s)
                return target

            yield fetch

    return ready


def _rclone_copy(timeout_s: float) -> Ready:
    @contextmanager
    def ready(directory: Path, place: Place, name: str) -> Iterator[Fetch]:
        target = directory / "downloaded"
        copy = [installed("rclone"), "copy", "--config=", f"bench:{BUCKET}/{name}", str(target)]

        def fetch() -> Path:
            run_tool(copy, inherited() | rclone_environment(place.server), timeout_s)
            return target

        yield fetch

    return ready


def _mount(contender: Contender) -> Ready:
    @contextmanager
    def ready(directory: Path, place: Place, name: str) -> Iterator[Fetch]:
        with contender.mount(directory, place.server) as mount:
            yield lambda: mount.path / name

    return ready


def _juicefs(volumes: dict[str, Volume]) -> Ready:
    @contextmanager
    def ready(directory: Path, place: Place, name: str) -> Iterator[Fetch]:
        with juicefs(volumes[name]).mount(directory, place.server) as mount:
            yield lambda: mount.path / name

    return ready
