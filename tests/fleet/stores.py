"""The store of a fleet, on a host of its own: bytes of objects that it has sent are counted."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.services import S3Server, accepts, put, run_daemon
from tests.services.buckets import uploaded
from tests.services.fast import LISTINGS, FastS3
from tests.services.seaweed import start_seaweed
from tests.support.network import Host

BUCKET = "models"
_PORT = 80
START_S = 30


@dataclass(frozen=True, slots=True)
class FleetStore:
    """A store with one bucket."""

    server: S3Server
    host: Host
    _sent: Callable[[], float]
    _put: Callable[[Mapping[str, bytes]], None]

    @property
    def url(self) -> str:
        """What to mount."""
        return f"s3://{BUCKET}"

    def environment(self) -> dict[str, str]:
        """The variables with which a member reaches it."""
        return {**self.server.environment(), "NO_PROXY": "*"}

    def sent_bytes(self) -> float:
        """Bytes of objects that it has sent so far."""
        return self.host.namespace.call(self._sent)

    def put(self, objects: Mapping[str, bytes]) -> None:
        """Store objects; the link of its host carries nothing of that."""
        self.host.namespace.call(lambda: self._put(objects))


@contextmanager
def a_fast_store(host: Host, directory: Path) -> Iterator[FleetStore]:
    """The emulation that starts at once: it checks no signatures and stores nothing but files in *directory*."""
    bucket = directory / BUCKET
    bucket.mkdir(parents=True)
    module = [sys.executable, "-m", "tests.services.fast"]
    server = FastS3(f"http://{host.name}:{_PORT}", "fast", "fast")
    with run_daemon(
        "fast",
        [*host.namespace.before, *module, f"--host={host.address}", f"--port={_PORT}", f"--root={directory}"],
        directory.parent / "fast.log",
        {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ) as daemon:
        daemon.wait_until(lambda: host.namespace.call(lambda: accepts(_PORT, host.address)), START_S)

        def sent() -> float:
            return sum(each.body_bytes for name, each in server.statistics().items() if not name.endswith(LISTINGS))

        def store(objects: Mapping[str, bytes]) -> None:
            for key, content in objects.items():
                path, fresh = bucket / key, directory / "upload"
                path.parent.mkdir(parents=True, exist_ok=True)
                fresh.write_bytes(content)
                uploaded(fresh)
                fresh.rename(path)  # so that nobody sees a part of it, or without its ETag

        yield FleetStore(server, host, sent, store)


@contextmanager
def a_real_store(host: Host, *, public: bool = False) -> Iterator[FleetStore]:
    """SeaweedFS; if it is *public*, it lets everyone read."""
    with start_seaweed(host, public=public) as server:
        store = FleetStore(
            server, host, lambda: server.sent_bytes(BUCKET), lambda objects: put(server, BUCKET, objects)
        )
        host.namespace.call(lambda: _create(server))
        yield store


def _create(server: S3Server) -> None:
    client = server.client()
    try:
        client.create_bucket(Bucket=BUCKET)
    finally:
        client.close()
