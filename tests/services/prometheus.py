"""Debian's Prometheus and promtool: unpacked, not installed, as the package starts a server for all networks."""

import functools
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.services import reserved_ports, run_daemon

_UNPACKED = Path(__file__).parents[2] / "build/debian"
PATIENCE_S = 60


@functools.cache
def program(name: str) -> str:
    """The path of ``prometheus`` or ``promtool``, from the Debian package of that name."""
    found = shutil.which(name) or shutil.which(name, path=str(_UNPACKED / "usr/bin"))
    if found is not None:
        return found
    with tempfile.TemporaryDirectory() as directory:
        command = f"apt-get download {name} || (apt-get update && apt-get download {name})"
        subprocess.run(["sh", "-c", command], cwd=directory, check=True, capture_output=True, timeout=300)
        [package] = Path(directory).glob("*.deb")
        _UNPACKED.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg", "-x", package, _UNPACKED], check=True)
    return str(_UNPACKED / "usr/bin" / name)


class Prometheus:
    """A running server."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an expression gives now: labels in ``metric``, and ``value``."""
        url = f"{self._url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]
        return found

    def firing(self) -> set[tuple[str, str]]:
        """The alerts that fire, with their mount points."""
        with urllib.request.urlopen(f"{self._url}/api/v1/alerts", timeout=30) as answer:
            alerts = json.load(answer)["data"]["alerts"]
        return {
            (alert["labels"]["alertname"], alert["labels"].get("mountpoint", ""))
            for alert in alerts
            if alert["state"] == "firing"
        }

    def wait_until(self, alert: tuple[str, str], *, fires: bool, timeout_s: float = PATIENCE_S) -> None:
        """Return once an alert fires, or does not."""
        deadline = time.monotonic() + timeout_s
        while (alert in self.firing()) is not fires:
            assert time.monotonic() < deadline, f"{alert} {'does not fire' if fires else 'goes on'}"
            time.sleep(0.5)


@contextmanager
def start_prometheus(
    directory: Path, target: str, token: str, rules: list[Path], *, interval: str
) -> Iterator[Prometheus]:
    """A server for these rules that scrapes an exporter, at ``host:port``."""
    directory.mkdir(exist_ok=True)
    settings = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval, "scrape_timeout": interval},
        "rule_files": [str(file) for file in rules],
        "scrape_configs": [
            {"job_name": "trimsfs", "static_configs": [{"targets": [target]}], "authorization": {"credentials": token}}
        ],
    }
    (directory / "prometheus.yml").write_text(json.dumps(settings))
    with reserved_ports() as ports:
        port = ports[0]
    argv = [
        program("prometheus"),
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with run_daemon("prometheus", argv, directory / "prometheus.log", env=dict(os.environ)) as daemon:
        daemon.wait_until(lambda: _ready(port), PATIENCE_S)
        yield Prometheus(port)


def _ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5):
            return True
    except OSError:
        return False
