"""A proxy in front of an S3 server that does to its answers what networks, proxies and S3 itself do at times.

It runs in a process of its own, so that tests may fork. What it does is drawn by a seed, by the request and by how
often that request has come: the same attempt at the same request meets the same fault, whoever comes first.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from . import HOST, S3Server, started

CONTROL = "/__faults"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which faults come: *share* of the requests that a fault can happen to, drawn by *seed*.

    With *first*, only the first so many attempts at each request; *only* is a text that a request's path must hold.
    """

    faults: Collection[str]
    share: float = 1.0
    first: int | None = None
    seed: int = 0
    only: str = ""


@dataclass(frozen=True, slots=True)
class FaultyS3(S3Server):
    """A server as seen through the proxy."""

    def inject(self, plan: Plan) -> None:
        """From now on, do this; what was counted is counted on."""
        self._ask("PUT", json.dumps(asdict(plan)).encode())

    def heal(self) -> None:
        """Do nothing to answers that begin from now on. Connections that hang go on hanging."""
        self.inject(Plan(faults=()))

    def injected(self) -> Counter[str]:
        """How often each fault has happened."""
        return Counter(json.loads(self._ask("GET")))

    def _ask(self, method: str, body: bytes = b"") -> bytes:
        netloc = urlsplit(self.endpoint_url).netloc
        with contextlib.closing(http.client.HTTPConnection(netloc, timeout=10)) as connection:
            connection.request(method, CONTROL, body)
            return connection.getresponse().read()


@contextlib.contextmanager
def faulty(server: S3Server) -> Iterator[FaultyS3]:
    """The server as seen through a proxy that does nothing to answers before it is told to."""
    command = [sys.executable, "-m", f"{__package__}.faults", f"--target={urlsplit(server.endpoint_url).netloc}"]
    with started("faulty", lambda ports: [*command, f"--port={ports[0]}"]) as (ports, daemon):
        yield FaultyS3(f"http://{HOST}:{ports[0]}", server.access_key, server.secret_key, server.region)
        assert "Traceback" not in daemon.log_file.read_text(), daemon.error("a defect of the proxy")
