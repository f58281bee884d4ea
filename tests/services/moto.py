"""moto's S3 in a process of its own: it has the checksums and parts that Ceph lacks."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import HOST, SCRATCH, S3Server, accepts, reserved_ports, run_daemon

log = logging.getLogger(__name__)


@contextlib.contextmanager
def start_moto() -> Iterator[S3Server]:
    """Run an empty moto server until the context ends; it accepts any credentials.

    Raises ServiceError when it does not answer within 30 seconds.
    """
    with (
        tempfile.TemporaryDirectory(prefix="trimsfs-moto-", dir=SCRATCH) as directory,
        reserved_ports() as ports,
        run_daemon(
            "moto",
            # -P: this very file must not pass for moto where the tests run in its directory.
            [sys.executable, "-P", "-m", "moto.server", "-H", HOST, "-p", str(ports[0])],
            Path(directory) / "moto.log",
            os.environ,
        ) as daemon,
    ):
        daemon.wait_until(lambda: accepts(ports[0]), 30)
        log.info("moto answers at port %d", ports[0])
        yield S3Server(f"http://{HOST}:{ports[0]}", "test", "test")
