"""The exporter on real mounts: what it tells, of whom, and what it survives."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.exporters import exporting
from tests.support.keepers import hanging
from tests.support.mounts import MountedStore, mounted, trimsfs, unmount, wait_until
from tests.support.nodes import a_node
from tests.support.processes import alive
from trimsfs.mountinfo import file_systems
from trimsfs.options import default_user
from trimsfs.server.sandbox import identity

MIB = 1 << 20
TOKEN = "0123456789abcdef0123456789abcdef"
UNPRIVILEGED = identity(default_user()).uid


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mount with a tenant, and two models of which one has been read."""
    directory = tmp_path_factory.mktemp("exporter")
    for name in ("llama", "tenant-a"):
        (directory / "store" / name).mkdir(parents=True)
        (directory / "store" / name / "weights").write_bytes(os.urandom(2 * MIB))
    config = directory / "tenants.toml"
    config.write_text('[[tenants]]\npath = "tenant-a"\ncache_size = "1GiB"\n')
    with mounted(directory / "store", directory / "mount", "--config", str(config)) as made:
        (made.path / "llama/weights").read_bytes()
        yield made


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A file with a token."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    return file


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def facts(pid: int) -> dict[str, str]:
    """What /proc tells of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_everybody_gets_what_everybody_may_see(mount: MountedStore) -> None:
    with exporting() as exporter:
        samples, status = exporter.samples(mount), exporter.status(mount)
        processes = [exporter.process.pid, *children(exporter.process.pid)]

        assert samples["trimsfs_up"] == 1
        assert samples["trimsfs_disk_used_bytes"] == 2 * MIB
        assert samples["trimsfs_fetch_fetched_bytes_total"] == 2 * MIB
        assert not [name for name in samples if "tenant" in name or "model'" in name]
        assert [model["model"] for model in status["models"]] == ["llama"]
        assert status["models"][0]["users"] == []
        assert len(processes) == 2
        for pid in processes:
            told = facts(pid)
            assert set(told["Uid"].split()) == {str(UNPRIVILEGED)}
            assert (int(told["CapEff"], 16), int(told["CapPrm"], 16), told["NoNewPrivs"]) == (0, 0, "1")
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes))


def test_who_has_the_token_gets_tenants_and_who_has_models_open(mount: MountedStore, token_file: Path) -> None:
    with exporting(token_file) as exporter, (mount.path / "llama/weights").open("rb"):
        samples, status = exporter.samples(mount), exporter.status(mount)
        server, (scraper,) = exporter.process.pid, children(exporter.process.pid)

        assert samples["trimsfs_disk_tenant_used_bytes{'tenant': 'tenant-a'}"] == 0
        assert sum(value for name, value in samples.items() if "'model': 'llama'" in name) > 0
        [model] = [model for model in status["models"] if model["model"] == "llama"]
        assert model["open"] == 1
        assert [user["pid"] for user in model["users"]] == [os.getpid()]
        assert set(facts(server)["Uid"].split()) == {str(UNPRIVILEGED)}
        assert int(facts(server)["CapPrm"], 16) == 0
        assert int(facts(scraper)["CapPrm"], 16) == 1 << 19 | 1 << 2
        assert str(scraper) not in Path(f"/proc/{server}/environ").read_text(errors="replace")
        assert not _listens(scraper)


def _listens(pid: int) -> bool:
    """Whether a process has a TCP socket."""
    tcp = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]}
    links = [os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")]
    return any(link.removeprefix("socket:[").removesuffix("]") in tcp for link in links)


def test_a_server_that_is_killed_leaves_no_gap(mount: MountedStore) -> None:
    with exporting(timeout_s=30) as exporter:
        for _ in range(3):
            before = mount.control()["server_pid"]
            os.kill(before, signal.SIGKILL)
            assert exporter.samples(mount)["trimsfs_up"] == 1
            wait_until(lambda before=before: mount.control()["server_pid"] != before)  # type: ignore[misc]
            time.sleep(1.1)  # an answer is given to others for a second
        assert exporter.samples(mount)["trimsfs_server_restarts_total"] >= 3


def test_a_server_that_hangs_is_down_and_keeps_no_other_waiting(mount: MountedStore, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with mounted(tmp_path / "store", tmp_path / "other") as other, exporting(timeout_s=5) as exporter:
        assert exporter.samples(other)["trimsfs_up"] == 1
        with hanging(other):
            time.sleep(1.1)
            for _ in range(2):  # once by a process that waits, once as that still does
                assert exporter.samples(other) == {"trimsfs_up": 0}
                assert exporter.samples(mount)["trimsfs_up"] == 1
                time.sleep(1.1)
            assert re.match("did not answer|has not answered", exporter.status(other)["error"])
        wait_until(lambda: exporter.samples(other)["trimsfs_up"] == 1, timeout_s=60)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_an_exporter_whose_scraper_is_killed_or_stopped_ends(mount: MountedStore, number: int) -> None:
    with exporting(timeout_s=1) as exporter:
        exporter.samples(mount)
        scraper = children(exporter.process.pid)[0]
        os.kill(scraper, number)
        assert exporter.process.wait(30) == 1
        with suppress(ProcessLookupError):
            os.kill(scraper, signal.SIGCONT)
        wait_until(lambda: not alive(scraper))
        assert exporter.process.stderr is not None
        assert (
            "the scraper has ended or does not answer, and the exporter ends with it: start it again"
            in exporter.process.stderr.read()
        )


@pytest.mark.alone
def test_mounts_share_one_exporter_that_ends_with_the_last(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    others = file_systems()
    address = f"unix:{tmp_path}/metrics.sock"
    with mounted(tmp_path / "store", tmp_path / "one", "--metrics-listen", address):
        wait_until(
            lambda: [set(facts(pid)["Uid"].split()) for pid in _exporters(address)] == [{str(UNPRIVILEGED)}],
            tolerate=OSError,
        )
        [exporter] = _exporters(address)
        log = Path(f"/proc/{exporter}/fd/2").read_text().splitlines()
        *_, listening = [line for line in log if line.endswith(f" listening at {address}")]
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ INFO listening", listening)
        with mounted(tmp_path / "store", tmp_path / "two", "--metrics-listen", address):
            assert _exporters(address) == [exporter]
        assert _exporters(address) == [exporter]
    if others:
        os.kill(exporter, signal.SIGTERM)  # mounts of others keep it
    wait_until(lambda: not Path(f"/proc/{exporter}").exists(), timeout_s=60)


@pytest.mark.alone
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_server_in_a_container_has_an_exporter_without_a_place_to_write(tmp_path: Path) -> None:
    others = file_systems()
    address = f"unix:{tmp_path}/metrics.sock"
    read_only = ("sh", "-ec", 'mount --bind -o ro /var /var; exec "$@"', "sh")
    with a_node(tmp_path, {}) as node:
        node.keeper()
        node.server("--metrics-listen", address, host_pid=True, before=read_only)
        node.serving()
        [exporter] = _exporters(address)
        assert f"listening at {address}" in node.log("server")
        assert "warning" not in node.log("server")
    if others:
        os.kill(exporter, signal.SIGTERM)  # mounts of others keep it
    wait_until(lambda: not Path(f"/proc/{exporter}").exists(), timeout_s=60)


def _exporters(address: str) -> list[int]:
    """The web servers of exporters at a Unix socket."""
    path = address.removeprefix("unix:")
    nodes = {line.split()[6] for line in Path("/proc/net/unix").read_text().splitlines()[1:] if line.endswith(path)}
    found = []
    for directory in Path("/proc").glob("[0-9]*/cmdline"):
        pid = int(directory.parent.name)
        try:
            if directory.read_text().startswith("trimsfs exporter"):
                links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
                found += [pid] * any(link.removeprefix("socket:[").removesuffix("]") in nodes for link in links)
        except OSError:
            continue
    return found


def test_a_mount_goes_on_without_an_exporter(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "taken").write_text("")
    mountpoint = tmp_path / "models"
    done = trimsfs("mount", tmp_path / "store", mountpoint, "--metrics-listen", f"unix:{tmp_path}/taken")
    try:
        assert done.returncode == 0
        warning = "this file is no socket: choose another address"
        assert done.stderr == f"trimsfs: warning: no metrics over HTTP: --listen unix:{tmp_path}/taken: {warning}\n"
    finally:
        unmount(mountpoint)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--listen", "0.0.0.0:9099"], "option --listen 0.0.0.0:9099: other hosts reach that: set --token-file FILE"),
        (["--listen", "nonsense"], "option --listen nonsense: is not an address such as 127.0.0.1:9099"),
        (["--listen", "unix:/dev/null"], "--listen unix:/dev/null: this file is no socket: choose another address"),
        (["--listen", "192.0.2.1:9099", "--token-file", "TOKEN"], "--listen 192.0.2.1:9099: Cannot assign requested"),
        (["--token-file", "/absent"], "option --token-file /absent: No such file or directory"),
    ],
)
def test_what_cannot_be_listened_at_is_told_in_a_line(options: list[str], message: str, token_file: Path) -> None:
    done = trimsfs("exporter", *(str(token_file) if option == "TOKEN" else option for option in options))

    assert done.returncode == 2
    assert done.stderr.startswith(f"trimsfs: {message}")
    assert done.stderr.count("\n") == 1
