"""Have engines load their models from local files and from a mount, also in forks of `trimsfs spawn`, and compare."""

import statistics
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.children import ChildError, Program
from tests.engines.engines import REPOSITORY, Engine, builder, command
from tests.engines.forks import Forked, forked
from tests.services import S3Server
from tests.support.mounts import MountedStore, mounted, trimsfs

BUCKET = "engines"
BUILD_S, LOAD_S = 600, 240
REPEATED = 3
SHARERS = 2


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one engine. Times in seconds, of load and first use; *mapped* and *copied* in bytes, of each of two
    processes at once; *size* is that of the files it loads. *forked* tells of forks that load from the mount."""

    engine: str
    size: int
    local_s: float
    cold_s: float
    warm_s: float
    mapped: int
    copied: int
    equal: bool
    forked: Forked


@dataclass(slots=True)
class Matrix:
    """Models in a directory and in a bucket of a server, and a mount of that; *divide* makes them so much smaller, and
    each load but the cold one is *repeated*: not at all where no times are wanted."""

    local: Path
    server: S3Server
    mount: MountedStore
    divide: int = 1
    repeated: int = REPEATED
    _built: set[str] = field(default_factory=set)

    def row(self, engine: Engine) -> Row:
        """Load the model of one engine in each way. Raises ChildError, TooSlowError, and as `forked`."""
        directory = self._model(engine)
        on_mount = self.mount.path / engine.program
        done = trimsfs("evict", on_mount)
        assert done.returncode == 0, done.stderr
        local = [self._load(engine, directory)]
        cold = self._load(engine, on_mount)
        warm = []
        for _ in range(self.repeated):  # in turns: what else the machine does meets both
            local.append(self._load(engine, directory))
            warm.append(self._load(engine, on_mount))
        loaded, memory = self._memory(engine, on_mount)
        outputs = {each["digest"] for each in (*local, cold, *warm, *loaded)}
        place = self.local.parent / f"forks-{engine.program}-{engine.way}"
        return Row(
            engine=engine.name,
            size=cold["size"],
            local_s=_median(local[1:] or local),  # the first brought the library's own files into memory
            cold_s=cold["load_s"],
            warm_s=_median(warm or loaded),
            mapped=min(each["mapped"] for each in memory),
            copied=min(each["copied"] for each in memory),
            equal=len(outputs) == 1,
            forked=forked(command(engine, "load", engine.way), on_mount, place, LOAD_S),
        )

    def _load(self, engine: Engine, directory: Path) -> dict[str, Any]:
        with _program(engine) as program:
            return _ask(program, directory)

    def _memory(self, engine: Engine, directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """What processes loaded, and what they map and have copied, while all of them hold the model."""
        with ExitStack() as stack:
            programs = [stack.enter_context(_program(engine)) for _ in range(SHARERS)]
            return [_ask(program, directory) for program in programs], [_ask(program) for program in programs]

    def _model(self, engine: Engine) -> Path:
        """The local directory of a program's models, which it builds, and which then is in the bucket."""
        directory = self.local / engine.program
        if engine.program not in self._built:
            if not directory.exists():
                staged = directory.with_suffix(".staged")
                done = subprocess.run(
                    command(builder(engine), "build", staged, f"--divide={self.divide}"),
                    cwd=REPOSITORY,
                    capture_output=True,
                    text=True,
                    timeout=BUILD_S,
                    check=False,
                )
                if done.returncode != 0:
                    raise ChildError(done.stderr.strip().splitlines()[-1])
                staged.rename(directory)
            _upload(self.server, self.local, directory)
            done = trimsfs("refresh", self.mount.path)  # the last row may have listed the bucket just before
            assert done.returncode == 0, done.stderr
            self._built.add(engine.program)
        return directory


@contextmanager
def matrix(server: S3Server, directory: Path, *, divide: int = 1, repeated: int = REPEATED) -> Iterator[Matrix]:
    """A mount of a bucket for engines; local models are beside it."""
    local = directory / "local"
    local.mkdir(parents=True, exist_ok=True)
    with closing(server.client()) as client:
        client.create_bucket(Bucket=BUCKET)
    options = ("--endpoint-url", server.endpoint_url, "--allow-empty")
    with mounted(f"s3://{BUCKET}", directory, *options, environment=server.environment()) as mount:
        yield Matrix(local, server, mount, divide, repeated)


@contextmanager
def _program(engine: Engine) -> Iterator[Program]:
    """An engine's program that waits for a path."""
    with Program(command(engine, "load", engine.way)) as program:
        program.wait_ready(LOAD_S)
        yield program


def _ask(program: Program, word: str | Path = "") -> dict[str, Any]:
    """What a program answers to a line."""
    program.tell(word)
    return program.outcome(LOAD_S)


def _upload(server: S3Server, root: Path, directory: Path) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    with closing(server.client()) as client, ThreadPoolExecutor(4) as pool:
        keys = [str(path.relative_to(root)) for path in files]
        list(pool.map(client.upload_file, map(str, files), [BUCKET] * len(files), keys))


def _median(outcomes: Sequence[dict[str, Any]]) -> float:
    return statistics.median(float(each["load_s"]) for each in outcomes)
