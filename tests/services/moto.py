"""moto's S3 in a process of its own: it has the checksums and parts that Ceph lacks."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from . import HOST, S3Server, started


@contextlib.contextmanager
def start_moto() -> Iterator[S3Server]:
    """Run an empty moto server until the context ends; it accepts any credentials. Raises as `started`."""
    arguments = [sys.executable, "-m", "moto.server", "-H", HOST, "-p"]
    with started("moto", lambda ports: [*arguments, str(ports[0])]) as (ports, _):
        yield S3Server(f"http://{HOST}:{ports[0]}", "test", "test")
