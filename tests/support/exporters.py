"""Exporters that tests start, and what they answer."""

import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.support.mounts import TRIMSFS, MountedStore


class Exporter:
    def __init__(self, process: "subprocess.Popen[str]", port: int, token: str | None) -> None:
        self.process = process
        self.port = port
        self.token = token
        self._headers = {"Authorization": f"Bearer {token}"} if token is not None else {}

    def get(self, path: str) -> str:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path, headers=self._headers)
            response = connection.getresponse()
            assert response.status == 200
            return response.read().decode()
        finally:
            connection.close()

    def samples(self, mount: MountedStore) -> dict[str, float]:
        """The samples of a mount, by name; those with labels of their own as the text has them."""
        found = {}
        for family in text_string_to_metric_families(self.get("/metrics")):
            for sample in family.samples:
                if sample.labels.pop("mountpoint") == str(mount.path):
                    found[sample.name + (str(sample.labels) if sample.labels else "")] = sample.value
        return found

    def status(self, mount: MountedStore) -> dict[str, Any]:
        """What the status page shows of a mount."""
        mounts = json.loads(self.get("/api/status"))["mounts"]
        return next(one for one in mounts if one["mountpoint"] == str(mount.path))


@contextmanager
def exporting(
    token_file: Path | None = None, listen: str = "127.0.0.1:0", timeout_s: float = 5, before: Sequence[str] = ()
) -> Iterator[Exporter]:
    """An exporter of this host's mounts. *before* is a program that starts it, as in another mount namespace."""
    options = ["--token-file", str(token_file)] if token_file is not None else []
    options += ["--timeout", str(timeout_s)]
    process = subprocess.Popen(
        [*before, TRIMSFS, "exporter", "--listen", listen, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r":(\d+)/$", line.strip())
        token = token_file.read_text() if token_file is not None else None
        yield Exporter(process, int(found[1]) if found else 0, token)
    finally:
        process.terminate()
        _, said = process.communicate(timeout=30)
        assert "Traceback" not in said, said
