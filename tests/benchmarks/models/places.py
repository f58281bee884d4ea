"""The endpoints that models come from: a real server and a fast one, each near and distant."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.bench import PROFILE_LATENCY_MS, PROFILE_RATE, Bench
from tests.services import S3Server
from tests.services.link import start_link
from tests.services.seaweed import start_seaweed

UPLOADS = 4


@dataclass(frozen=True, slots=True)
class Place:
    """An endpoint as the tables name it; *short* as the command line does.

    The fast endpoints serve what is written to the store. The real one has it *uploaded*.
    """

    name: str
    short: str
    server: S3Server
    distant: bool
    main: bool
    uploaded: "Uploads | None" = None

    def offer(self, store: Path, relative: Path) -> None:
        """Have all files of a directory of a bucket of the store, BUCKET/DIRECTORY, at this endpoint."""
        if self.uploaded is not None:
            self.uploaded.add(store, relative)


@dataclass(frozen=True, slots=True)
class Uploads:
    """What the real server has."""

    server: S3Server
    _there: set[Path] = field(default_factory=set)

    def add(self, store: Path, relative: Path) -> None:
        """Upload a directory unless it is there."""
        if relative in self._there:
            return
        bucket = relative.parts[0]
        with closing(self.server.client()) as client, ThreadPoolExecutor(UPLOADS) as pool:
            if bucket not in {each["Name"] for each in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=bucket)
            files = [path for path in sorted((store / relative).rglob("*")) if path.is_file()]
            keys = [str(path.relative_to(store / bucket)) for path in files]
            list(pool.map(client.upload_file, map(str, files), [bucket] * len(files), keys))
        os.sync()
        self._there.add(relative)


@contextmanager
def places(bench: Bench, wanted: set[str]) -> Iterator[list[Place]]:
    """Those that are *wanted* by their short names, or all if none is; the real server runs only if it is needed."""
    with ExitStack() as stack:
        found = [
            Place("fast endpoint", "fast", bench.plain, distant=False, main=False),
            Place("fast endpoint, distant", "fast-distant", bench.profile, distant=True, main=True),
        ]
        if not wanted or wanted & {"seaweed", "seaweed-distant"}:
            server = stack.enter_context(start_seaweed())
            link = stack.enter_context(start_link(server, latency_ms=PROFILE_LATENCY_MS, rate=PROFILE_RATE))
            uploads = Uploads(server)
            found = [
                Place("SeaweedFS", "seaweed", server, distant=False, main=True, uploaded=uploads),
                Place("SeaweedFS, distant", "seaweed-distant", link, distant=True, main=False, uploaded=uploads),
                *found,
            ]
        yield [place for place in found if not wanted or place.short in wanted]
