"""Where models come from: a real server, over https and http; on a host that computes; and far away."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.bench import PROFILE_LATENCY_MS, PROFILE_RATE
from tests.benchmarks.data import chill
from tests.services import S3Server
from tests.services.link import start_link
from tests.services.seaweed import Seaweed, start_seaweed

UPLOADS = 4
SLOW_RATE = 25_000_000
SLOW_TEXT = "25 ms, 25 MB/s for all connections together"
HTTPS, HTTP, BUSY_HTTPS, BUSY_HTTP = "https", "http", "busy-https", "busy-http"
DISTANT, SLOW = "distant", "slow"
PLACES = (HTTPS, HTTP, BUSY_HTTPS, BUSY_HTTP, DISTANT, SLOW)


@dataclass(frozen=True, slots=True)
class Uploads:
    """What the server has."""

    server: S3Server
    _there: set[Path] = field(default_factory=set)

    def add(self, store: Path, relative: Path) -> None:
        """Upload a directory unless it is there, and let go of the memory of its files here."""
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
        for path in files:
            chill(path)
        self._there.add(relative)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """An endpoint as the command line names it; *busy* if programs compute on this host while a model loads."""

    name: str
    server: S3Server
    source: Seaweed
    uploads: Uploads

    @property
    def busy(self) -> bool:
        """Whether programs compute here while a model loads."""
        return self.name in {BUSY_HTTPS, BUSY_HTTP}

    def offer(self, store: Path, relative: Path) -> None:
        """Have all files of a directory of a bucket of the store, BUCKET/DIRECTORY, at this endpoint."""
        self.uploads.add(store, relative)


@contextmanager
def places(wanted: set[str]) -> Iterator[list[Place]]:
    """Those that are *wanted*, or all if none is."""
    with ExitStack() as stack:
        http = stack.enter_context(start_seaweed())
        https = http.over_https()
        far = stack.enter_context(start_link(https, latency_ms=PROFILE_LATENCY_MS, rate=PROFILE_RATE))
        slow = stack.enter_context(start_link(https, latency_ms=PROFILE_LATENCY_MS, rate=SLOW_RATE, shared=True))
        servers = dict(zip(PLACES, (https, http, https, http, far, slow), strict=True))
        uploads = Uploads(http)
        yield [
            Place(name=name, server=server, source=http, uploads=uploads)
            for name, server in servers.items()
            if not wanted or name in wanted
        ]
