"""A fake Hugging Face hub in a process of its own: no real one can be reached from where the tests run."""

from __future__ import annotations

import contextlib
import http.client
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from . import HOST, started
from .hub_server import TOKEN

__all__ = ["TOKEN", "Hub", "start_hub"]


@dataclass(frozen=True, slots=True)
class Hub:
    """A running fake hub. Repositories are named KIND/ORG/NAME, as in ``model/org/m``."""

    port: int

    @property
    def endpoint(self) -> str:
        """The address, as of HF_ENDPOINT."""
        return f"http://{HOST}:{self.port}"

    def new(self, repository: str) -> None:
        """Make an empty repository, or empty one by another commit."""
        self._tell(f"new/{repository}")

    def put(self, repository: str, path: str, content: bytes) -> str:
        """Commit a file to the main branch. Returns the commit."""
        return str(self._tell(f"put/{repository}/{path}", content)["commit"])

    def delete(self, repository: str, path: str) -> None:
        """Commit the deletion of a file."""
        self._tell(f"delete/{repository}/{path}")

    def tag(self, repository: str, ref: str, commit: str = "") -> None:
        """Make or move a branch, by default to the head of main."""
        self._tell(f"tag/{repository}/{ref}", commit.encode())

    def drop(self, repository: str, commit: str) -> None:
        """Lose a commit, as a squash of the history does."""
        self._tell(f"drop/{repository}/{commit}")

    def restrict(self, repository: str, access: str) -> None:
        """Make a repository "gated", "gated, not granted", "private", or public again by ""."""
        self._tell(f"access/{repository}", access.encode())

    def set(self, name: str, value: object) -> None:
        """Set an attribute of `hub_server.State`."""
        self._tell(f"set/{name}", json.dumps(value).encode())

    def requests(self) -> list[str]:
        """The requests since this was last asked: ``GET PATH RANGE``, or ``CDN PATH RANGE``."""
        return list(self._tell("requests"))

    def _tell(self, what: str, body: bytes = b"") -> Any:
        with contextlib.closing(http.client.HTTPConnection(HOST, self.port, timeout=30)) as connection:
            connection.request("PUT", f"/fake/{quote(what)}", body)
            return json.loads(connection.getresponse().read())


@contextlib.contextmanager
def start_hub() -> Iterator[Hub]:
    """Run an empty hub until the context ends. Raises as `started`."""
    command = [sys.executable, "-m", f"{__package__}.hub_server"]
    with started("hub", lambda ports: [*command, str(ports[0]), str(ports[1])]) as (ports, daemon):
        yield Hub(ports[0])
        assert "Traceback" not in daemon.log_file.read_text(), daemon.error("a defect of the fake")
