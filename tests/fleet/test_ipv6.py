"""Hosts that have no address but those of IPv6: store, mount, exporter and fleet; and one that has none of IPv6."""

import re
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fleet.members import Fleet, Member, a_fleet
from tests.fleet.reading import new_object, read_together, undisturbed
from tests.fleet.stores import a_real_store
from tests.services.seaweed import Seaweed
from tests.support.mount_namespace import apart
from tests.support.mounts import TRIMSFS, let_in, log_beside, mounted, trimsfs, unmount
from tests.support.network import MEGABIT, Host, a_network
from trimsfs.fetch.bypass import HEAD_BYTES

MIB = 1 << 20
SIZE = 27 * MIB
RATE = 1000 * MEGABIT
TOKEN = "0123456789abcdef0123456789abcdef"
TIMEOUT_S = 30


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Two members that are up, and a real store."""
    if not Path("/proc/sys/net/ipv6").exists():
        pytest.skip("the kernel has no IPv6")
    directory = tmp_path_factory.mktemp("ipv6")
    let_in(directory)
    with a_network(6, only=True) as network, a_real_store(network.host(RATE)) as store:
        hosts = [network.host(RATE) for _ in range(2)]
        with a_fleet(directory / "members", store, hosts, "--metadata-ttl", "1") as fleet:
            fleet.up(fleet.members)
            yield fleet


@pytest.fixture
def member(fleet: Fleet) -> Member:
    return fleet.members[0]


@contextmanager
def exporting(host: Host, listen: str, *options: str | Path) -> Iterator[int]:
    """An exporter on a host; the port that it has chosen."""
    command = [*host.namespace.before, TRIMSFS, "exporter", "--listen", listen, *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = re.fullmatch(r"listening at http://\[[0-9a-f:]+\]:(\d+)/\n", process.stdout.readline())
            assert told is not None
            yield int(told[1])
        finally:
            process.terminate()


def scraped(host: Host, url: str, headers: Sequence[tuple[str, str]] = ()) -> str:
    """What a program on a host gets."""
    request = urllib.request.Request(url, headers=dict(headers))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get() -> str:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return str(answer.read().decode())

    return host.namespace.call(get)


def test_hosts_have_no_address_but_those_of_ipv6(fleet: Fleet) -> None:
    for host in (fleet.store.host, *(member.host for member in fleet.members)):
        told = host.namespace.run("ip", "-brief", "address")
        assert host.address in told
        assert re.findall(r"\d+\.\d+\.\d+\.\d+", told) == []


def test_members_fetch_from_each_other(fleet: Fleet) -> None:
    def sent(number: int) -> float:
        expected = new_object(fleet, f"once-{number}", SIZE)
        before = fleet.store.sent_bytes()
        read_together(fleet.members, expected.name, expected)
        return fleet.store.sent_bytes() - before

    assert SIZE <= undisturbed(fleet.members, sent) < 1.02 * SIZE + len(fleet.members) * HEAD_BYTES
    late, *others = fleet.members
    expected = new_object(fleet, "late", SIZE)
    read_together(others, expected.name, expected)
    assert (late.mount.path / expected.name).stat().st_size == SIZE
    with fleet.store.host.unplugged():
        read_together([late], expected.name, expected)


def test_a_store_is_read_over_https_by_its_address(fleet: Fleet, member: Member, tmp_path: Path) -> None:
    expected = new_object(fleet, "secure", SIZE)
    assert isinstance(fleet.store.server, Seaweed)
    environment = fleet.store.environment() | fleet.store.server.over_https().environment()
    endpoint = fleet.store.server.https_url
    before = member.host.namespace.before
    with mounted(
        fleet.store.url, tmp_path, "--endpoint-url", endpoint, environment=environment, before=before
    ) as mount:
        assert (mount.path / expected.name).read_bytes() == expected.read_bytes()
    doctor = ("doctor", "--store", fleet.store.url, "--cache-dir", tmp_path / "cache", "passthrough=no", "gpu=off")
    done = trimsfs(*doctor, environment=environment, before=before)
    assert f"ok    store: {fleet.store.url} can be listed and read" in done.stdout


@pytest.mark.parametrize("listen", ["[::1]", "[::]"])
def test_metrics_are_served(member: Member, listen: str, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    options: tuple[str | Path, ...] = () if listen == "[::1]" else ("--token-file", token)
    with exporting(member.host, f"{listen}:0", *options) as port:
        for name in ("[::1]", *([member.host.name] if options else ())):
            url = f"http://{name}:{port}/metrics"
            told = scraped(member.host, url, [("Authorization", f"Bearer {TOKEN}")] if options else [])
            assert f'trimsfs_up{{mountpoint="{member.mount.path}"}} 1.0' in told


def test_what_needs_ipv4_is_told_in_one_line(fleet: Fleet, member: Member, tmp_path: Path) -> None:
    before = member.host.namespace.before
    done = trimsfs("exporter", before=before)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--listen 127.0.0.1:9099: " in done.stderr
    assert "choose another address" in done.stderr
    places = ("--cache-dir", tmp_path / "cache", "--log-file", log_beside(tmp_path))
    done = trimsfs(
        *("mount", fleet.store.url, tmp_path / "models", *places, "--endpoint-url", "http://127.0.0.1:1"),
        environment=fleet.store.environment(),
        before=before,
    )
    unmount(tmp_path / "models") if done.returncode == 0 else None
    assert (done.returncode, done.stderr.count("\n")) == (7, 1), done.stderr
    assert "http://127.0.0.1:1" in done.stderr
    assert "check the network and --endpoint-url" in done.stderr


def test_without_ipv6_an_address_of_it_is_told_in_one_line_and_a_name_that_has_one_works(tmp_path: Path) -> None:
    """As where DNS gives a store addresses of both kinds."""
    (tmp_path / "hosts").write_text("::1 store\n127.0.0.1 localhost store\n")
    (tmp_path / "models").mkdir()
    let_in(tmp_path)
    with (
        a_network(4, only=True) as network,
        a_real_store(replace(network.host(RATE), address="127.0.0.1")) as store,
    ):
        before = store.host.namespace.before
        assert "inet6" not in store.host.namespace.run("ip", "address")
        store.put({"model": b"weights"})
        done = trimsfs("exporter", "--listen", "[::1]:0", before=before)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert "--listen [::1]:0: " in done.stderr
        assert "choose another address" in done.stderr

        environment = store.environment()
        environment["AWS_ENDPOINT_URL"] = environment["AWS_ENDPOINT_URL"].replace("127.0.0.1", "store")
        places = ("--cache-dir", tmp_path / "cache", "--log-file", tmp_path / "log")
        with apart(["mount", "--bind", tmp_path / "hosts", "/etc/hosts"], before=before) as namespace:
            assert "::1" in namespace.run("getent", "--no-addrconfig", "ahosts", "store").stdout
            done = namespace.run(TRIMSFS, "mount", store.url, tmp_path / "models", *places, **environment)
            try:
                assert done.returncode == 0, done.stderr
                assert namespace.run("cat", tmp_path / "models/model").stdout == "weights"
            finally:
                namespace.run(TRIMSFS, "umount", "--lazy", tmp_path / "models")
