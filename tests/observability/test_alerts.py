"""Debian's Prometheus scrapes real mounts: each alert fires for its fault, and stops after it; the dashboard has data.

The rules are those of packaging/observability with shorter times: what they say in minutes takes seconds here.
"""

import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fleet.members import Fleet, a_fleet
from tests.fleet.reading import read_together
from tests.fleet.stores import a_fast_store
from tests.gpu.scene import scene
from tests.observability.queries import DIRECTORY, metrics, queries
from tests.services import S3Server, reserved_ports
from tests.services.faulty import FaultyS3, Plan, faulty
from tests.services.prometheus import Prometheus, start_prometheus
from tests.support import keepers
from tests.support.exporters import Exporter, exporting
from tests.support.keepers import hanging
from tests.support.mounts import MOUNTCTL, MountedStore, let_in, mounted, trimsfs, wait_until
from tests.support.network import MEGABIT, a_network
from tests.support.parts import blob_files, flip_byte
from tests.support.signing import new_key, pem

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(600)]

MIB = 1 << 20
BUCKET = "alerts"
TOKEN = "0123456789abcdef0123456789abcdef"
SHORTER = {"[2m]": "[10s]", "[5m]": "[20s]", "[10m]": "[20s]", "[15m]": "[60s]", "[1h]": "[20s]"}
FEW, OPEN = 1600, 1340
"""Descriptors that a server may have, and files to open: it keeps 256 for other purposes."""
FLEET_RATE = 1000 * MEGABIT
OUTAGE = Plan(faults=("reset",))
names = (f"model-{number}/weights" for number in itertools.count())


@dataclass
class Host:
    """A mount of a bucket and one of a directory, with an exporter and a Prometheus."""

    server: S3Server
    store: FaultyS3
    bucket: MountedStore
    directory: MountedStore
    prometheus: Prometheus
    listen: str
    token_file: Path
    exporter: ExitStack

    def start_exporter(self) -> Exporter:
        """Start an exporter at the address that Prometheus knows."""
        return self.exporter.enter_context(exporting(self.token_file, self.listen, timeout_s=1.5))

    def upload(self, size: int) -> str:
        """Upload a model; its path on the mount of the bucket."""
        name = next(names)
        with contextlib.closing(self.server.client()) as client:
            client.put_object(Bucket=BUCKET, Key=name, Body=random.Random(name).randbytes(size))
        wait_until((self.bucket.path / name).exists)
        return name

    @contextmanager
    def alert(self, name: str, mount: MountedStore | None = None, *, stops: bool = True) -> Iterator[None]:
        """An alert that does not fire before, fires for a fault, which is the body, and stops afterwards."""
        key = (name, str(mount.path) if mount is not None else "")
        self.prometheus.wait_until(key, fires=False)
        yield
        self.prometheus.wait_until(key, fires=True)
        if stops:
            self.prometheus.wait_until(key, fires=False, timeout_s=120)

    def sees(self, name: str, mount: MountedStore | None = None, *, fires: bool) -> None:
        """Wait until an alert fires, or stops."""
        self.prometheus.wait_until((name, str(mount.path) if mount is not None else ""), fires=fires, timeout_s=120)


def shorter(directory: Path) -> list[Path]:
    """The rules with shorter times."""
    files = []
    for name in ("alerts.yml", "recording.yml"):
        rules: dict[str, Any] = yaml.safe_load((DIRECTORY / name).read_text())
        for rule in rules["groups"][0]["rules"]:
            rule.pop("for", None)
            for long, short in SHORTER.items():
                window = "[3s]" if rule.get("alert") == "TrimsfsNotCompared" else short
                rule["expr"] = rule["expr"].replace(long, window)
        rules["groups"][0].pop("interval", None)
        files.append(directory / name)
        files[-1].write_text(json.dumps(rules))
    return files


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, moto: S3Server) -> Iterator[Host]:
    """All that is watched, and who watches it."""
    directory = tmp_path_factory.mktemp("alerts")
    (directory / "store").mkdir()
    token_file = directory / "token"
    token_file.write_text(TOKEN)
    token_file.chmod(0o600)
    with contextlib.closing(moto.client()) as client:
        client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="first", Body=b"first")
    with ExitStack() as stack:
        store = stack.enter_context(faulty(moto))
        options = ("--retry-deadline", "3", "--prefetch", "off", "--metadata-ttl", "0.5")
        environment = store.environment()
        bucket = stack.enter_context(mounted(f"s3://{BUCKET}", directory / "s3", *options, environment=environment))
        small = ("--cache-size", "16MiB", "--prefetch", "off")
        files = stack.enter_context(mounted(directory / "store", directory / "files", *small))
        with reserved_ports() as ports:
            listen = f"127.0.0.1:{ports[0]}"
        rules = shorter(directory)
        prometheus = stack.enter_context(
            start_prometheus(directory / "prometheus", listen, TOKEN, rules, interval="2s")
        )
        exporter = stack.enter_context(ExitStack())
        found = Host(moto, store, bucket, files, prometheus, listen, token_file, exporter)
        found.start_exporter()
        wait_until(lambda: len(prometheus.query("trimsfs_up == 1")) >= 2, timeout_s=60)
        yield found


@pytest.fixture(autouse=True)
def heals(host: Host) -> Iterator[None]:
    """A test that fails leaves no fault to the next."""
    yield
    host.store.heal()


def test_an_exporter_that_is_stopped(host: Host) -> None:
    with host.alert("TrimsfsExporterDown", stops=False):
        host.exporter.close()
    host.start_exporter()
    host.sees("TrimsfsExporterDown", fires=False)


def test_a_server_that_hangs(host: Host) -> None:
    with ExitStack() as fault:
        with host.alert("TrimsfsMountDown", host.directory, stops=False):
            fault.enter_context(hanging(host.directory))
        assert ("TrimsfsMountDown", str(host.bucket.path)) not in host.prometheus.firing()
    host.sees("TrimsfsMountDown", host.directory, fires=False)


def test_a_mount_that_goes_away(host: Host, tmp_path: Path, store_directory: Path) -> None:
    with ExitStack() as mounts:
        mount = mounts.enter_context(mounted(store_directory, tmp_path))
        wait_until(lambda: bool(host.prometheus.query(_sample("trimsfs_up", mount))), 60)
        with host.alert("TrimsfsMountGone", mount):
            mounts.close()


def test_a_keeper_that_is_killed(host: Host) -> None:
    keeper = host.directory.control()["keeper_pid"]
    with host.alert("TrimsfsKeeperGone", host.directory, stops=False):
        os.kill(keeper, signal.SIGKILL)
    os.spawnl(os.P_WAIT, MOUNTCTL, MOUNTCTL, "recover", str(host.directory.path))
    host.sees("TrimsfsKeeperGone", host.directory, fires=False)


def test_servers_that_are_killed(host: Host) -> None:
    with host.alert("TrimsfsServerCrashes", host.bucket):
        for _ in range(3):
            keepers.kill(host.bucket)


def test_a_store_that_does_not_answer(host: Host) -> None:
    path = host.bucket.path / host.upload(3 * MIB)
    with host.alert("TrimsfsFetchFailed", host.bucket):
        with host.alert("TrimsfsStoreDown", host.bucket, stops=False):
            host.store.inject(OUTAGE)
            with pytest.raises(OSError, match="Input/output error"):
                path.read_bytes()
        host.store.heal()
        host.sees("TrimsfsStoreDown", host.bucket, fires=False)
    assert len(path.read_bytes()) == 3 * MIB


def test_a_store_that_throttles(host: Host) -> None:
    path = host.bucket.path / host.upload(40 * MIB)
    with host.alert("TrimsfsStoreErrors", host.bucket):
        host.store.inject(Plan(faults=("slow down",), first=2))
        assert len(path.read_bytes()) == 40 * MIB
        host.store.heal()


def test_a_server_with_few_descriptors(host: Host, tmp_path: Path, store_directory: Path) -> None:
    """What the kernel reads by itself takes none."""
    for number in range(OPEN):
        (store_directory / f"weights-{number}").write_bytes(b"x")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limits = ("prlimit", f"--nofile={FEW}:{FEW}")
    options = ("passthrough=no", "--prefetch", "off")
    with mounted(store_directory, tmp_path, *options, before=limits) as mount:
        with host.alert("TrimsfsDescriptorsNearLimit", mount, stops=False), ExitStack() as held:
            for number in range(OPEN):
                held.enter_context((mount.path / f"weights-{number}").open("rb"))
            host.sees("TrimsfsDescriptorsNearLimit", mount, fires=True)
        host.sees("TrimsfsDescriptorsNearLimit", mount, fires=False)


def test_a_model_that_does_not_fit_in_the_cache(host: Host) -> None:
    store = host.directory.path.parents[1] / "store/large"
    store.write_bytes(os.urandom(40 * MIB))
    with host.alert("TrimsfsCacheFull", host.directory):
        wait_until((host.directory.path / "large").exists)
        assert (host.directory.path / "large").read_bytes() == store.read_bytes()


def test_a_disk_that_changes_bytes(host: Host) -> None:
    path = host.bucket.path / host.upload(3 * MIB)
    with path.open("rb") as file, host.alert("TrimsfsDiskOrMemoryDamage", host.bucket):
        file.read()
        flip_byte(_blob_of(host.bucket, path), MIB)
        assert trimsfs("verify", path).returncode == 18


def _blob_of(mount: MountedStore, path: Path) -> Path:
    """The local copy of a file."""
    content = path.read_bytes()
    return next(blob for blob in blob_files(mount.cache) if blob.read_bytes() == content)


def test_a_network_that_changes_bytes(host: Host) -> None:
    name = host.upload(3 * MIB)
    with host.alert("TrimsfsWrongBytes", host.bucket):
        host.store.inject(Plan(faults=("flipped bit",), first=1, only=name))
        (host.bucket.path / name).read_bytes()
        wait_until(lambda: host.bucket.metrics()["trimsfs_integrity_differing_total"] > 0, timeout_s=60)
        host.store.heal()


def test_damage_that_cannot_be_repaired(host: Host) -> None:
    path = host.bucket.path / host.upload(3 * MIB)
    with path.open("rb") as file:
        file.read()
        blob = _blob_of(host.bucket, path)
        with host.alert("TrimsfsQuarantine", host.bucket, stops=False):
            host.store.inject(OUTAGE)
            flip_byte(blob, MIB)
            assert trimsfs("verify", path).returncode == 18
    host.store.heal()
    host.sees("TrimsfsQuarantine", host.bucket, fires=False)


def test_copies_that_wait_for_their_comparison(host: Host) -> None:
    path = host.bucket.path / host.upload(40 * MIB)
    with host.alert("TrimsfsNotCompared", host.bucket):
        path.read_bytes()


def test_cold_opens_that_wait_for_long(host: Host, tmp_path: Path) -> None:
    options = ("--cold-open", "wait", "stall_timeout=6", "--retry-deadline", "60", "--prefetch", "off")
    with mounted(f"s3://{BUCKET}", tmp_path, *options, environment=host.store.environment()) as mount:
        wait_until(lambda: bool(host.prometheus.query(_sample("trimsfs_up", mount))), 60)
        name = host.upload(3 * MIB)
        wait_until((mount.path / name).exists)
        with host.alert("TrimsfsColdOpensSlow", mount):
            host.store.inject(Plan(faults=("stall",), first=2, only=name))
            (mount.path / name).open("rb").close()
            host.store.heal()


def test_a_model_that_is_not_signed(host: Host, tmp_path: Path, store_directory: Path) -> None:
    (tmp_path / "key.pem").write_bytes(pem(new_key()))
    (store_directory / "weights").write_bytes(b"unsigned")
    options = ("signatures=require", f"signing_key={tmp_path}/key.pem")
    with mounted(store_directory, tmp_path, *options) as mount:
        wait_until(lambda: bool(host.prometheus.query(_sample("trimsfs_signatures_refusals_total", mount))), 60)
        with host.alert("TrimsfsSignatureRefused", mount), pytest.raises(PermissionError):
            (mount.path / "weights").read_bytes()


def _sample(name: str, mount: MountedStore) -> str:
    return f'{name}{{mountpoint="{mount.path}"}}'


def test_a_gpu_that_is_lost(host: Host, tmp_path: Path, store_directory: Path) -> None:
    (store_directory / "net.bin").write_bytes(os.urandom(MIB))
    (store_directory / "other.bin").write_bytes(os.urandom(MIB))
    with scene(store_directory, tmp_path) as gpus:
        wait_until(lambda: bool(host.prometheus.query(_sample("trimsfs_gpu_device_loads_total", gpus.mount))), 60)
        with host.alert("TrimsfsGpuLoadsFail", gpus.mount), gpus.kernel.devices[0].paused():
            program = gpus.program()
            program.tell("control_file", path=gpus.control_file("net.bin"))
            wait_until(lambda: [copy["state"] for copy in gpus.copies()] == ["loading"])
            gpus.kernel.devices[0].lose()


@pytest.fixture
def fleet(host: Host, tmp_path: Path) -> Iterator[Fleet]:
    """Three members, which Prometheus knows."""
    let_in(tmp_path)
    with a_network() as network, a_fast_store(network.host(FLEET_RATE), tmp_path / "fleet-store") as store:
        hosts = [network.host(FLEET_RATE) for _ in range(3)]
        with a_fleet(tmp_path / "fleet", store, hosts, "--metadata-ttl", "0.5") as members:
            members.up(members.members)
            metric = "trimsfs_fleet_members"
            for member in members.members:
                wait_until(lambda: bool(host.prometheus.query(_sample(metric, member.mount))), 60)  # noqa: B023 at once
            yield members


def _read(fleet: Fleet, *readers: int) -> Path:
    """Have members read a new object; its content."""
    expected = fleet.directory / next(names).replace("/", "-")
    expected.write_bytes(random.Random(expected.name).randbytes(40 * MIB))
    fleet.store.put({expected.name: expected.read_bytes()})
    some = [fleet.members[number] for number in readers]
    for member in some:
        wait_until((member.mount.path / expected.name).exists)
    read_together(some, expected.name, expected)
    return expected


def test_a_member_of_a_fleet_that_is_lost(host: Host, fleet: Fleet) -> None:
    reader, other, lost = fleet.members
    with host.alert("TrimsfsFleetMemberFails", reader.mount):
        lost.kill()
        for _ in range(10):  # until one of its chunks is wanted
            _read(fleet, 0, 1)
            if reader.mount.metrics()["trimsfs_fleet_failing_members"]:
                break
        host.sees("TrimsfsFleetMemberFails", reader.mount, fires=True)
        fleet.announce([reader, other])


def test_a_member_of_a_fleet_that_sends_wrong_bytes(host: Host, fleet: Fleet) -> None:
    *early, late = fleet.members
    with host.alert("TrimsfsFleetDamage", late.mount):
        expected = _read(fleet, 0, 1)
        for member in early:
            for blob in blob_files(member.mount.cache):
                for offset in range(MIB // 2, blob.stat().st_size, MIB):
                    flip_byte(blob, offset)
        assert (late.mount.path / expected.name).stat().st_size == expected.stat().st_size
        read_together([late], expected.name, expected)


def test_every_query_of_the_dashboard_returns_data(
    host: Host, fleet: Fleet, tmp_path: Path, store_directory: Path
) -> None:
    """Of metrics that servers of this version tell, of a fleet's and one with a GPU too."""
    (store_directory / "net.bin").write_bytes(os.urandom(MIB))
    stop = threading.Event()
    programs = threading.Thread(target=_use, args=(host, stop))
    programs.start()
    try:
        with scene(store_directory, tmp_path) as gpus:
            _read(fleet, 0, 1, 2)
            gpus.program().ask("control_file", path=gpus.control_file("net.bin"))
            time.sleep(20)
            told = set(re.findall(r"^(trimsfs_\w+)", "\n".join(_told(host)), re.MULTILINE)) | {"up"}
            asked = [query for query in queries() if _needed(query) <= told]
            assert len(asked) == len(queries())
            for query in asked:
                for variable in ("$instance", "$mountpoint"):
                    query = query.replace(variable, ".*")  # noqa: PLW2901
                query = query.replace("$__rate_interval", "20s").replace("$__range", "5m")  # noqa: PLW2901
                assert host.prometheus.query(query), query
    finally:
        stop.set()
        programs.join()


def _told(host: Host) -> list[str]:
    """The names of all samples."""
    return [one["metric"]["__name__"] for one in host.prometheus.query('{__name__=~"trimsfs_.*"}')]


def _needed(query: str) -> set[str]:
    """The metrics of servers that a query needs, also by way of what is recorded."""
    rules = yaml.safe_load((DIRECTORY / "recording.yml").read_text())["groups"][0]["rules"]
    return {name for rule in rules if rule["record"] in query for name in metrics(rule["expr"])} | set(metrics(query))


def _use(host: Host, stop: threading.Event) -> None:
    """Open models, some for the first time."""
    while not stop.is_set():
        path = host.bucket.path / host.upload(MIB)
        for _ in range(3):
            path.read_bytes()
            with path.open("rb"), path.open("rb"):
                stop.wait(0.2)
        stop.wait(1)
