"""What mountctl does with a real systemd, which starts and stops the units of declared mounts."""

import fcntl
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mountctl.linux.cdi_specs import default_output
from tests.support.booted import SYSTEMD, Booted, booted
from tests.support.mounts import MOUNTCTL, TRIMSFS, let_in, wait_until

CONTAINERS = Path(__file__).parents[2] / "docs/containers.md"
pytestmark = pytest.mark.skipif(not SYSTEMD.exists(), reason="systemd is not installed")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the declared mounts, their stores, caches and mount points."""
    return tmp_path_factory.mktemp("mounts.d")


@pytest.fixture(scope="module")
def system(directory: Path) -> Iterator[Booted]:
    with booted(directory) as system:
        yield system


@pytest.fixture
def mountpoint(directory: Path, system: Booted) -> Iterator[Path]:
    """The mount point of the declared mount ``models``, down at first and in the end."""
    store = directory / "store"
    store.mkdir(exist_ok=True)
    let_in(directory)
    (store / "model").write_bytes(b"weights")
    lines = [f'mountpoint = "{directory / "models"}"', f'store = "{store}"', f'cache_dir = "{directory / "cache"}"']
    (directory / "models.toml").write_text("\n".join(lines))
    yield directory / "models"
    system.run("systemctl", "stop", "trimsfs@models")


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Keep servers from a cache directory, as another server would."""
    cache.mkdir(exist_ok=True)
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def reader(system: Booted, file: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process beside systemd that has a file open, and reads it once it gets a line."""
    script = f"exec 3< {file}; echo open; read line; cat <&3"
    pipe = subprocess.PIPE
    with subprocess.Popen(system.command("bash", "-c", script), stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_up_and_down_start_and_stop_the_unit(system: Booted, mountpoint: Path) -> None:
    done = system.mountctl("up", "models")
    assert (done.returncode, done.stderr) == (0, "")
    assert system.state("models") == "active"
    assert system.run("cat", mountpoint / "model").stdout == "weights"
    assert system.mountctl("down", "models").returncode == 0
    assert system.state("models") == "inactive"
    assert system.mountctl("down", "models").stdout == "models is down\n"


def test_the_documented_drop_in_makes_devices_at_each_mount(system: Booted, mountpoint: Path, directory: Path) -> None:
    (directory / "store/bert").mkdir(exist_ok=True)
    (drop_in,) = re.findall(r"\[Service\]\n *ExecStartPost=.* cdi .*\n", CONTAINERS.read_text())
    drop_in = drop_in.replace("/usr/local/bin/mountctl", MOUNTCTL).replace(" /models\n", f" {mountpoint}\n")
    place, spec = "/run/systemd/system/trimsfs@models.service.d", default_output(mountpoint)
    system.run("mkdir", "-p", place)
    system.run("sh", "-c", f"printf %s '{drop_in}' > {place}/devices.conf; systemctl daemon-reload")
    try:
        for _ in range(2):
            assert system.mountctl("up", "models").returncode == 0
            assert '"name": "bert"' in system.run("cat", spec).stdout
            assert system.mountctl("down", "models").returncode == 0
            wait_until(lambda: system.run("test", "-e", spec).returncode == 1)
    finally:
        system.run("sh", "-c", f"rm -r {place}; systemctl daemon-reload")


def test_a_mount_that_another_directory_declares_is_none_of_the_unit(
    system: Booted, mountpoint: Path, tmp_path: Path
) -> None:
    assert system.mountctl("up", "models").returncode == 0
    let_in(tmp_path)
    lines = [f'mountpoint = "{tmp_path / "models"}"', f'store = "{mountpoint.parent / "store"}"']
    (tmp_path / "models.toml").write_text("\n".join([*lines, f'cache_dir = "{tmp_path / "cache"}"']))
    of_another = ("--mounts-dir", tmp_path, "models")
    done = system.mountctl("up", *of_another)
    assert (done.returncode, done.stderr) == (0, "")
    assert system.run("cat", tmp_path / "models/model").stdout == "weights"
    assert system.mountctl("down", *of_another).returncode == 0
    assert (system.state("models"), system.run("cat", mountpoint / "model").stdout) == ("active", "weights")


def test_a_unit_whose_mount_is_declared_elsewhere_by_now(system: Booted, mountpoint: Path) -> None:
    assert system.mountctl("up", "models").returncode == 0
    declared, elsewhere = mountpoint.parent / "models.toml", mountpoint.with_name("elsewhere")
    declared.write_text(declared.read_text().replace(f'"{mountpoint}"', f'"{elsewhere}"'))
    done = system.mountctl("up", "models")
    told = f"mountctl: models: its unit serves {mountpoint}, not {elsewhere}: `mountctl down models` first\n"
    assert (done.returncode, done.stderr) == (4, told)
    assert system.mountctl("down", "models").returncode == 0
    assert system.state("models") == "inactive"
    done = system.mountctl("up", "models")
    assert (done.returncode, done.stderr) == (0, "")
    assert system.run("cat", elsewhere / "model").stdout == "weights"


def test_a_log_of_an_earlier_mount_is_not_taken_for_that_of_the_unit(system: Booted, mountpoint: Path) -> None:
    log = mountpoint.with_name("earlier.log")
    log.write_text("of yesterday\n")
    with (mountpoint.parent / "models.toml").open("a") as file:
        file.write(f'\nlog_file = "{log}"')
    assert system.mountctl("up", "models").returncode == 0
    assert "  log         to standard error of its unit" in system.run(TRIMSFS, "status", mountpoint).stdout
    assert "is mounted at" in system.mountctl("logs", "models").stdout
    done = system.run("setpriv", "--reuid=3003", "--regid=3003", "--clear-groups", MOUNTCTL, "logs", "models")
    assert done.returncode == 11, done.stderr


def test_up_tells_why_the_unit_failed_and_down_ends_its_retries(system: Booted, mountpoint: Path) -> None:
    cache = mountpoint.with_name("cache")
    with locked(cache):
        done = system.mountctl("up", "models")
        assert (done.returncode, done.stderr.count("\n")) == (8, 1), done.stderr
        assert done.stderr.startswith(f"mountctl: models: cache directory {cache} is in use by another server")
        assert system.state("models") == "activating"
        assert system.mountctl("down", "models").stdout == "models is down\n"
        assert system.state("models") == "inactive"


def test_up_tells_which_option_the_unit_cannot_use(system: Booted, mountpoint: Path) -> None:
    with (mountpoint.parent / "models.toml").open("a") as file:
        file.write("\ncache_size = '1 stone'")
    done = system.mountctl("up", "models")
    assert done.returncode == 2
    assert done.stderr.startswith("mountctl: models: option cache_size = '1 stone' in ")


def test_down_lazy_lets_open_files_work_on_and_up_names_their_reader(system: Booted, mountpoint: Path) -> None:
    cache = mountpoint.with_name("cache")
    assert system.mountctl("up", "models").returncode == 0
    with reader(system, mountpoint / "model") as process:
        done = system.mountctl("down", "--lazy", "models")
        assert (done.returncode, "(bash)" in done.stderr) == (0, True), done.stderr
        assert system.state("models") == "active"
        done = system.mountctl("up", "models")
        assert done.returncode == 8
        assert f"mountctl: models: cache directory {cache} is in use by another server, pid " in done.stderr
        assert re.search(r"; its mount was detached and is in use by pid \d+ \(bash\): end that\n$", done.stderr)
        assert process.communicate("\n")[0] == "weights"
    wait_until(lambda: system.state("models") == "inactive")
    assert system.mountctl("up", "models").returncode == 0


def test_up_directly_after_down_lazy_mounts_again(system: Booted, mountpoint: Path) -> None:
    assert system.mountctl("up", "models").returncode == 0
    for _ in range(3):
        assert system.mountctl("down", "--lazy", "models").returncode == 0
        assert system.mountctl("up", "models").returncode == 0
        assert system.run("cat", mountpoint / "model").stdout == "weights"


def test_up_down_and_logs_are_about_the_server_where_that_is_a_unit_of_its_own(
    system: Booted, mountpoint: Path
) -> None:
    units = ("trimsfs-keeper@models", "trimsfs-server@models")

    def states() -> list[str]:
        return [system.run("systemctl", "is-active", unit).stdout.strip() for unit in (*units, "trimsfs@models")]

    system.run("systemctl", "enable", *units)
    try:
        done = system.mountctl("up", "models")
        assert (done.returncode, done.stderr, states()) == (0, "", ["active", "active", "inactive"])
        assert system.run("cat", mountpoint / "model").stdout == "weights"
        assert "serving" in system.mountctl("logs", "models").stdout
        assert system.mountctl("down", "models").returncode == 0
        assert states() == ["active", "inactive", "inactive"]
        with locked(mountpoint.with_name("cache")):
            done = system.mountctl("up", "models")
            assert (done.returncode, "is in use by another server" in done.stderr) == (8, True), done.stderr
            assert states()[1] == "activating"
            assert system.mountctl("down", "models").stdout == "models is down\n"
            assert states()[1] == "inactive"
    finally:
        system.run("systemctl", "disable", "--now", *units)
    assert system.mountctl("up", "models").returncode == 0
    assert system.state("models") == "active"


def test_a_server_in_a_mount_namespace_of_its_own_sees_later_mounts_and_keeps_none(
    system: Booted, mountpoint: Path
) -> None:
    later, bind = mountpoint.with_name("store") / "later", mountpoint.with_name("bind")
    later.mkdir()
    bind.mkdir()
    try:
        assert system.run("systemctl", "start", "trimsfs-keeper@models", "trimsfs-server@models").returncode == 0
        server = re.search(r"server pid (\d+)", system.mountctl("status", "models").stdout)
        assert server is not None
        own, root = (system.run("readlink", f"/proc/{pid}/ns/mnt").stdout for pid in (server[1], "1"))
        assert own != root
        system.run("sh", "-c", f"mount -t tmpfs tmpfs {later}; echo late > {later}/model")
        assert system.run("cat", mountpoint / "later/model").stdout == "late\n"
        assert system.run("umount", later).returncode == 0

        system.run("systemctl", "restart", "trimsfs-server@models")  # its namespace begins with the mount in it
        system.run("mount", "--bind", mountpoint, bind)
        done = system.mountctl("down", "models")
        assert (done.returncode, f"is in use by the mount at {bind}" in done.stderr) == (12, True), done.stderr
        system.run("umount", bind)
        with reader(system, mountpoint / "model") as process:
            done = system.mountctl("down", "models")
            assert (done.returncode, "(bash)" in done.stderr) == (12, True), done.stderr
            assert process.communicate("\n")[0] == "weights"
        done = system.mountctl("down", "models")
        assert (done.returncode, done.stderr) == (0, "")
        assert system.run("pgrep", "-f", "^trimsfs server").stdout == ""
    finally:
        system.run("systemctl", "stop", "trimsfs-server@models", "trimsfs-keeper@models")


def test_status_of_a_unit_without_its_keeper_tells_that_systemd_starts_another(
    system: Booted, mountpoint: Path
) -> None:
    assert system.mountctl("up", "models").returncode == 0
    keeper = re.search(r'"keeper_pid": (\d+)', system.mountctl("status", "--json", "models").stdout)
    assert keeper is not None
    system.run("kill", "-STOP", keeper[1])
    done = system.mountctl("status", "models")
    told = f"the keeper is stopped (pid {keeper[1]}): systemd starts another within 60 s\n"
    assert (done.returncode, done.stdout) == (1, f"models: not kept at {mountpoint}: {told}")
    system.run("kill", "-KILL", keeper[1])
    wait_until(lambda: system.mountctl("status", "models").returncode == 0)
