"""SeaweedFS as a cache between the hosts of a network and a store: its cluster has mounted the store's bucket.

Each host has a volume server, and an S3 gateway of its own; one more host has the master and the filer.
"""

import os
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.network import Host

from . import HOST, SCRATCH, Daemon, S3Server, ServiceError, accepts, installed, reserved_ports, run_daemon
from .seaweed import START_S, STOP_S, VOLUME_MIB, VOLUMES, identities, remove_sockets

_UNTRUSTED = {"allowUntrustedRemoteEndpoints": "true"}
"""Else it refuses stores with private addresses."""


@dataclass(frozen=True, slots=True)
class SeaweedCluster:
    """A running cluster. Each host of it reaches its own gateway at the ``endpoint_url``."""

    endpoint_url: str
    _master: str
    _filer: str
    _host: Host

    def mount(self, store: S3Server, bucket: str) -> None:
        """Show a store's bucket, of which nothing is here yet."""
        keys = f"-s3.access_key={store.access_key} -s3.secret_key={store.secret_key} -s3.region={store.region}"
        self.shell(
            f"remote.configure -name=store -type=s3 {keys} -s3.endpoint={store.endpoint_url} -s3.force_path_style=true",
            f"remote.mount -dir=/buckets/{bucket} -remote=store/{bucket}",
        )

    def fill(self, bucket: str, timeout_s: float) -> None:
        """Have all objects of a mounted bucket fetched from the store."""
        self.shell(f"remote.cache -dir=/buckets/{bucket}", timeout_s=timeout_s)

    def shell(self, *commands: str, timeout_s: float = START_S) -> str:
        """What weed's shell says to some commands. Raises ServiceError if one fails."""
        program = [*self._host.namespace.before, installed("weed"), "shell"]
        done = subprocess.run(
            [*program, f"-master={self._master}", f"-filer={self._filer}"],
            input="".join(f"{command}\n" for command in (*commands, "exit")),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode != 0 or "error:" in done.stdout + done.stderr:
            raise ServiceError(f"weed shell: {done.stdout}{done.stderr}")
        return done.stdout


@contextmanager
def start_seaweed_cluster(center: Host, hosts: Sequence[Host]) -> Iterator[SeaweedCluster]:
    """Run an empty cluster until the context ends. Raises ServiceError when it does not answer in time."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimsfs-cluster-", dir=SCRATCH)))
        (directory / "s3.json").write_text(identities())
        master, master_grpc, filer, filer_grpc, gateway, *_ = _ports(stack)

        def run(host: Host, name: str, port: int, options: Mapping[str, object], address: str = "") -> Daemon:
            log = directory / f"{host.address}-{name}.log"
            named = {"port": port, "ip": host.address, **options}
            arguments = ["-logtostderr=true", name, *(f"-{option}={value}" for option, value in named.items())]
            command = [*host.namespace.before, installed("weed"), *arguments]
            daemon = stack.enter_context(run_daemon(f"weed {name}", command, log, os.environ, STOP_S))
            daemon.wait_until(lambda: host.namespace.call(lambda: accepts(port, address or host.address)), START_S)
            return daemon

        def registered() -> bool:
            """Whether the master knows the volume servers: it gives no place for chunks before."""
            with urllib.request.urlopen(f"http://{center.address}:{master}/dir/status", timeout=START_S) as answer:
                topology = answer.read().decode()
            return all(f'"{host.address}:' in topology for host in hosts)

        def room(host: Host, name: str) -> Path:
            path = directory / f"{host.address}-{name}"
            path.mkdir()
            return path

        masters = f"{center.address}:{master}.{master_grpc}"
        filers = f"{center.address}:{filer}.{filer_grpc}"
        options = {"port.grpc": master_grpc, "mdir": room(center, "master"), "peers": "none", "telemetry": "false"}
        daemon = run(center, "master", master, {**options, "volumeSizeLimitMB": VOLUME_MIB})
        for host in hosts:
            port, grpc, *_ = _ports(stack)
            options = {"port.grpc": grpc, "dir": room(host, "volume"), "max": VOLUMES, "preStopSeconds": 0}
            trusting = {f"volume.{name}": value for name, value in _UNTRUSTED.items()}
            run(host, "volume", port, {**options, **trusting, "master": masters})
        daemon.wait_until(lambda: center.namespace.call(registered), START_S)
        options = {"port.grpc": filer_grpc, "defaultStoreDir": room(center, "filer"), "master": masters}
        run(center, "filer", filer, {**options, **_UNTRUSTED, "localSocket": directory / "filer.sock"})
        for host in hosts:
            grpc, *_ = _ports(stack)
            options = {"port.grpc": grpc, "ip.bind": "0.0.0.0", "filer": filers, "config": directory / "s3.json"}
            unused = {"port.iceberg": 0, "port.lance": 0, "localSocket": directory / f"{host.address}.sock"}
            run(host, "s3", gateway, {**options, **unused, **_UNTRUSTED}, HOST)
        yield SeaweedCluster(f"http://{HOST}:{gateway}", masters, filers, center)


def _ports(stack: ExitStack) -> range:
    """Ports that no server has, on any host: their numbers name sockets, which all hosts share."""
    ports = stack.enter_context(reserved_ports())
    stack.callback(remove_sockets, ports)
    return ports
