"""A single-node Ceph object store: one monitor, one OSD in memory, and the S3 gateway."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
import urllib.parse
import uuid
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from . import HOST, SCRATCH, Daemon, S3Server, ServiceError, accepts, reserved_ports, run_daemon, run_tool

log = logging.getLogger(__name__)

_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin", "setpriv")
_USER = "test"
_OPS_LOG = "ops.log"
_MARKER_BUCKET = "ops-log-marker"
# The gateway logs a request only after its last byte is sent: time for a thread that lags there.
_OPS_LOG_SETTLE = 0.05

_CONFIG = """\
[global]
fsid = {fsid}
mon_host = {mon_address}
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
ms_mon_client_mode = crc
ms_bind_msgr1 = false
ms_bind_port_min = {osd_port_min}
ms_bind_port_max = {osd_port_max}
public_addr = {host}
cluster_addr = {host}
keyring = {directory}/keyring
log_file = {directory}/$name.log
admin_socket = {directory}/$name.asok
pid_file = {directory}/$name.pid
crash_dir = {directory}
debug_ms = 0
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
mon_allow_pool_size_one = true
osd_pool_default_pg_autoscale_mode = off
[mon]
mon_data = {directory}/mon
mon_cluster_log_file = {directory}/cluster.log
mon_data_avail_crit = 1
[osd]
osd_data = {directory}/osd
osd_class_dir = {class_directory}
erasure_code_dir = {erasure_code_directory}
osd_objectstore = memstore
memstore_device_bytes = 8589934592
[client.rgw]
rgw_data = {directory}/rgw
rgw_frontends = beast endpoint={host}:{rgw_port} tcp_nodelay=1
rgw_thread_pool_size = 64
rgw_crypt_require_ssl = false
rgw_gc_obj_min_wait = 2
rgw_gc_processor_period = 5
debug_rgw = 0
rgw_enable_ops_log = true
rgw_ops_log_rados = false
rgw_ops_log_file_path = {directory}/ops.log
rgw_log_http_headers = http_range
rgw_log_nonexistent_bucket = true
rgw_s3_auth_use_sts = true
rgw_sts_key = 0123456789abcdef
"""


@dataclass(frozen=True, slots=True)
class Op:
    """One request that the gateway has answered, as its ops log tells it."""

    operation: str
    method: str
    bucket: str
    key: str
    http_range: str | None
    http_status: int
    bytes_sent: int
    object_size: int
    user_agent: str
    trans_id: str

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> Self:
        """Read one entry; the key, which it lacks, is taken from the request's path."""
        method, _, target = entry["uri"].removesuffix(" HTTP/1.1").partition(" ")
        path = urllib.parse.unquote(target.partition("?")[0])
        headers = ChainMap(*entry.get("http_x_headers", ()))
        return cls(
            operation=entry["operation"],
            method=method,
            bucket=entry["bucket"],
            key=path.removeprefix(f"/{entry['bucket']}").removeprefix("/"),
            http_range=headers.get("HTTP_RANGE"),
            http_status=int(entry["http_status"]),
            bytes_sent=entry["bytes_sent"],
            object_size=entry["object_size"],
            user_agent=entry["user_agent"],
            trans_id=entry["trans_id"],
        )


class Gateway:
    """The process that speaks S3, which can be halted, killed and started anew: the objects are in another."""

    def __init__(self, run: Callable[[], contextlib.AbstractContextManager[Daemon]], port: int) -> None:
        self._run = run
        self._port = port
        self._stack = contextlib.ExitStack()
        self._daemon: Daemon | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.resume()
        self._stack.close()

    def start(self) -> None:
        """Start it, at the same port each time, and wait until it answers."""
        self._daemon = self._stack.enter_context(self._run())
        self._daemon.wait_until(lambda: accepts(self._port), 30)

    def kill(self) -> None:
        """End it as a crash would."""
        self._signal(signal.SIGKILL)
        assert self._daemon is not None
        self._daemon.process.wait()

    def halt(self) -> None:
        """Let it stand still: the kernel accepts connections for it, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """The opposite of `halt`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._daemon is not None
        self._daemon.process.send_signal(number)


@dataclass(frozen=True, slots=True)
class Ceph(S3Server):
    """A running Ceph: its S3 endpoint, its gateway, and the directory with its logs."""

    directory: Path = field(kw_only=True)
    gateway: Gateway = field(kw_only=True)

    def add_key(self) -> tuple[str, str]:
        """Make another access key for the same user, and its secret key."""
        access_key, secret_key = secrets.token_hex(10), secrets.token_hex(20)
        self._admin("key", "create", "--key-type=s3", f"--access-key={access_key}", f"--secret-key={secret_key}")
        return access_key, secret_key

    def remove_key(self, access_key: str) -> None:
        """Accept an access key no longer."""
        self._admin("key", "rm", "--key-type=s3", f"--access-key={access_key}")

    def _admin(self, *arguments: str) -> None:
        self.administer(*arguments, f"--uid={_USER}")

    def administer(self, *arguments: str) -> None:
        """Call radosgw-admin, as for users and roles."""
        environment = {"PATH": os.environ.get("PATH", os.defpath), "CEPH_CONF": str(self.directory / "ceph.conf")}
        run_tool(["radosgw-admin", "-n", "client.rgw", *arguments], environment, 60)

    def ops(self, timeout: float = 10) -> list[Op]:
        """Return the requests answered before this call, in the order they ended.

        Raises ServiceError when the ops log does not catch up within `timeout` seconds, and
        OSError when the gateway is gone.
        """
        deadline = time.monotonic() + timeout
        marker = _mark(urllib.parse.urlsplit(self.endpoint_url).netloc)
        time.sleep(_OPS_LOG_SETTLE)
        while True:
            found = [Op.of(entry) for entry in _entries(self.directory / _OPS_LOG)]
            if any(op.trans_id == marker for op in found):
                return [op for op in found if op.bucket != _MARKER_BUCKET]
            if time.monotonic() > deadline:
                raise ServiceError(f"radosgw: request {marker} not in its ops log")
            time.sleep(0.01)

    def bytes_sent(self, bucket: str, key: str, timeout: float = 10) -> tuple[int, int]:
        """Return how many GETs of an object succeeded so far, and the body bytes they sent.

        A GET that its client broke off counts only the chunks (of 4 MiB) sent whole. Raises
        what `ops` raises.
        """
        sizes = [
            op.bytes_sent
            for op in self.ops(timeout)
            if (op.operation, op.method, op.bucket, op.key) == ("get_obj", "GET", bucket, key)
            and op.http_status in {200, 206}
        ]
        return len(sizes), sum(sizes)


def missing_programs() -> list[str]:
    """Return the names of the programs `start_ceph` needs that are not installed."""
    return [name for name in _PROGRAMS if shutil.which(name) is None]


@contextlib.contextmanager
def start_ceph() -> Iterator[Ceph]:
    """Run an empty Ceph, which keeps its objects in memory, until the context ends.

    It stores 8 GiB: PUTs beyond that hang. The store ends with the thread that started it, should that end first.
    Raises ServiceError when any part of it does not start in time, and then leaves nothing behind.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="trimsfs-ceph-", dir=SCRATCH) as directory, reserved_ports() as ports:
        cluster = _Cluster(Path(directory), ports[0], ports[1], ports[2:])
        cluster.configure()
        with cluster.run_mon() as mon, cluster.run_osd(mon) as osd, cluster.run_rgw(osd) as ceph:
            log.info("%s answers after %.1f s", ceph.endpoint_url, time.monotonic() - begun)
            yield ceph


@dataclass(frozen=True, slots=True)
class _Cluster:
    directory: Path
    mon_port: int
    rgw_port: int
    osd_ports: range
    fsid: str = field(default_factory=lambda: str(uuid.uuid4()))

    @property
    def mon_address(self) -> str:
        return f"[v2:{HOST}:{self.mon_port}]"

    @property
    def env(self) -> dict[str, str]:
        # Nothing else: `ceph` is a script for the system's own Python.
        path = os.environ.get("PATH", os.defpath)
        return {"PATH": path, "CEPH_CONF": str(self.directory / "ceph.conf")}

    def configure(self) -> None:
        for name in ("mon", "osd", "rgw"):
            (self.directory / name).mkdir()
        for name in ("keyring", _OPS_LOG):
            (self.directory / name).touch()
        config = _CONFIG.format(
            fsid=self.fsid,
            mon_address=self.mon_address,
            osd_port_min=self.osd_ports[0],
            osd_port_max=self.osd_ports[-1],
            host=HOST,
            directory=self.directory,
            class_directory=_library("rados-classes"),
            erasure_code_directory=_library("ceph/erasure-code"),
            rgw_port=self.rgw_port,
        )
        (self.directory / "ceph.conf").write_text(config)

    @contextlib.contextmanager
    def run_mon(self) -> Iterator[Daemon]:
        monmap = str(self.directory / "monmap")
        create = ["monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", self.mon_address]
        run_tool([*create, monmap], self.env, 10)
        run_tool(["ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap], self.env, 30)
        with self._run("mon.a", ["ceph-mon", "-f", "-i", "a"]) as mon:
            mon.wait_until(lambda: accepts(self.mon_port), 10)
            yield mon

    @contextlib.contextmanager
    def run_osd(self, mon: Daemon) -> Iterator[Daemon]:
        osd_uuid = str(uuid.uuid4())
        run_tool(["ceph", "osd", "new", osd_uuid, "0"], self.env, 30, mon)
        run_tool(["ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd_uuid], self.env, 30, mon)
        with self._run("osd.0", ["ceph-osd", "-f", "-i", "0"]) as osd:
            osd.wait_until(lambda: self._osds_up(mon) == 1, 10)
            yield osd

    @contextlib.contextmanager
    def run_rgw(self, osd: Daemon) -> Iterator[Ceph]:
        netloc = f"{HOST}:{self.rgw_port}"
        key, secret = secrets.token_hex(10), secrets.token_hex(20)
        create = ["radosgw-admin", "-n", "client.rgw", "user", "create", f"--uid={_USER}"]
        options = ["--display-name=test", f"--access-key={key}", f"--secret-key={secret}"]
        run_tool([*create, *options], self.env, 60, osd)
        run = partial(self._run, "client.rgw", ["radosgw", "-f", "-n", "client.rgw"])
        with Gateway(run, self.rgw_port) as gateway:
            yield Ceph(f"http://{netloc}", key, secret, directory=self.directory, gateway=gateway)

    def _run(self, name: str, argv: list[str]) -> contextlib.AbstractContextManager[Daemon]:
        return run_daemon(name, argv, self.directory / f"{name}.log", self.env)

    def _osds_up(self, mon: Daemon) -> int:
        status = json.loads(run_tool(["ceph", "osd", "stat", "-f", "json"], self.env, 10, mon))
        up: int = status["num_up_osds"]
        return up


def _library(name: str) -> Path:
    found = [path for level in ("lib*", "lib*/*") for path in Path("/usr").glob(f"{level}/{name}")]
    if not found:
        raise ServiceError(f"Ceph's {name} is nowhere in /usr/lib")
    return found[0]


def _entries(ops_log: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole entries of an ops log: several may share a line, the last may be partial."""
    text = ops_log.read_text(errors="replace")
    decoder = json.JSONDecoder()
    position = 0
    with contextlib.suppress(json.JSONDecodeError):
        while (position := text.find("{", position)) >= 0:
            entry, position = decoder.raw_decode(text, position)
            yield entry


def _mark(netloc: str) -> str:
    """Make a request that is logged and touches nothing, and return its id."""
    with contextlib.closing(http.client.HTTPConnection(netloc, timeout=10)) as connection:
        connection.request("HEAD", f"/{_MARKER_BUCKET}")
        response = connection.getresponse()
        response.read()
        return response.headers["x-amz-request-id"]
