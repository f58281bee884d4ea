"""What an operator does: declared mounts, fstab, and what is told when it goes wrong."""

import contextlib
import json
import mmap
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.mounts import TRIMSFS, again_while_copied, trimsfs, umount, wait_until
from tests.support.mounts import mountctl as run_mountctl
from trimsfs.mountinfo import mount_at

BIN = Path(TRIMSFS).parent
Mountctl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def declared(tmp_path: Path) -> Path:
    """A directory of declared mounts."""
    directory = tmp_path / "mounts.d"
    directory.mkdir()
    return directory


@pytest.fixture
def mountctl(declared: Path) -> Iterator[Mountctl]:
    """Run mountctl for the declared mounts, all of which are down in the end."""
    run = partial(run_mountctl, environment={"TRIMSFS_MOUNTS_DIR": str(declared)})
    yield run
    run("down", "--lazy")


def declare(declared: Path, name: str, store: Path, tmp_path: Path) -> Path:
    """Declare a mount; its mount point."""
    mountpoint = tmp_path / name
    (declared / f"{name}.toml").write_text(
        f'''mountpoint = "{mountpoint}"
store = "{store}"
cache_dir = "{tmp_path / f"cache-{name}"}"
log_file = "{tmp_path / f"{name}.log"}"'''
    )
    return mountpoint


def test_up_tells_that_a_mount_has_other_options_than_its_file(
    mountctl: Mountctl, declared: Path, store_directory: Path, tmp_path: Path
) -> None:
    (store_directory / "model").write_bytes(b"weights")
    declare(declared, "one", store_directory, tmp_path)
    assert mountctl("up", "one").returncode == 0
    with (declared / "one.toml").open("a") as file:
        file.write('\ncache_size = "1GiB"\nprefetch = "off"\n')
    done = mountctl("up", "one")
    told = "mountctl: one: declared with other options (cache_size, prefetch): `mountctl upgrade one` applies them\n"
    assert (done.returncode, done.stderr) == (0, told)
    assert mountctl("upgrade", "one").returncode == 0
    done = mountctl("up", "one")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.alone  # asks all mounts of the host
def test_declared_mounts_go_up_and_down(
    mountctl: Mountctl, declared: Path, store_directory: Path, tmp_path: Path
) -> None:
    (store_directory / "model").write_bytes(b"weights")
    one, other = (declare(declared, name, store_directory, tmp_path) for name in ("one", "other"))

    assert mountctl("status").returncode == 10
    done = mountctl("up")
    assert done.returncode == 0, done.stderr
    assert (one / "model").read_bytes() == (other / "model").read_bytes() == b"weights"
    done = mountctl("up", "one")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"one is up at {one}\n", "")
    done = mountctl("status")
    assert done.returncode == 0
    assert [line.split(",")[0] for line in done.stdout.splitlines()[:2]] == [
        f"one: serving at {one}",
        f"other: serving at {other}",
    ]
    (facts,) = json.loads(mountctl("status", other, "--json").stdout)
    assert (facts["name"], facts["mountpoint"], facts["restarts"]) == ("other", str(other), 0)
    assert "serving" in mountctl("logs", "one", "-n", "5").stdout
    assert mountctl("down", "one").returncode == 0
    assert (mount_at(one), mount_at(other) is None) == (None, False)
    assert mountctl("down", "one").stdout == "one is down\n"
    assert "is unmounted" in mountctl("logs", "one").stdout


def test_what_cannot_be_done_is_told_in_a_line(
    mountctl: Mountctl, declared: Path, store_directory: Path, tmp_path: Path
) -> None:
    declare(declared, "one", store_directory, tmp_path)
    for arguments, code, message in (
        (("up", "two"), 2, "two: no such mount is declared in"),
        (("up", "../one"), 10, "is not declared"),
        (("up", str(tmp_path)), 10, "is not declared"),
        (("restart", "one"), 10, "one: no trimsfs mount at"),
        (("upgrade", "one"), 10, "one: no trimsfs mount at"),
        (("abort", "one"), 10, "no trimsfs mount"),
        (("recover", "one"), 10, "one: no trimsfs mount at"),
        (("logs", tmp_path / "elsewhere"), 10, "no trimsfs mount"),
        (("run", str(tmp_path)), 10, "is not declared"),
        (("down", str(tmp_path)), 10, f"{tmp_path}: no trimsfs mount"),
    ):
        done = mountctl(*arguments)
        assert (done.returncode, message in done.stderr, done.stderr.count("\n")) == (code, True, 1), done.stderr


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("one", 'store = "/srv"', "no mountpoint"),
        ("one", 'mountpoint = "models"', "an absolute path"),
        ("one", "mountpoint = ", "not valid TOML"),
        ("a b", 'mountpoint = "/models"', "rename the file"),
        ("one", 'mountpoint = "/models"\nshop = "x"', "there is no such option"),
    ],
)
def test_a_declaration_that_cannot_be_used_is_told(
    name: str, text: str, message: str, mountctl: Mountctl, declared: Path
) -> None:
    (declared / f"{name}.toml").write_text(text)
    done = mountctl("up")
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    (declared / f"{name}.toml").unlink()


def test_a_mount_in_use_is_not_taken_down(
    mountctl: Mountctl, declared: Path, store_directory: Path, tmp_path: Path
) -> None:
    (store_directory / "model").write_bytes(b"weights")
    mountpoint = declare(declared, "one", store_directory, tmp_path)
    assert mountctl("up").returncode == 0
    with (mountpoint / "model").open("rb") as file:
        done = mountctl("down", "one")
        assert (done.returncode, f"by pid {os.getpid()} (" in done.stderr) == (12, True), done.stderr
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with contextlib.closing(mapping):
        done = mountctl("down", "one")
        assert (done.returncode, f"by pid {os.getpid()} (" in done.stderr) == (12, True), done.stderr
    with subprocess.Popen(["sleep", "60"], cwd=mountpoint) as inside:
        done = mountctl("down", "one")
        inside.kill()
    assert (done.returncode, f"by pid {inside.pid} (sleep): end that" in done.stderr) == (12, True), done.stderr
    with (mountpoint / "model").open("rb") as file:
        assert mountctl("down", "--lazy", "one").returncode == 0
        assert mount_at(mountpoint) is None
        assert file.read() == b"weights"


def test_a_mount_whose_keeper_is_gone_is_told(
    mountctl: Mountctl, declared: Path, store_directory: Path, tmp_path: Path
) -> None:
    declare(declared, "one", store_directory, tmp_path)
    assert mountctl("up").returncode == 0
    (facts,) = json.loads(mountctl("status", "one", "--json").stdout)
    os.kill(facts["keeper_pid"], signal.SIGKILL)
    done = mountctl("status", "one")
    assert (done.returncode, "not kept" in done.stdout) == (1, True)
    done = mountctl("up", "one")
    assert (done.returncode, done.stdout, "not kept" in done.stderr) == (1, "", True), done.stderr
    done = mountctl("restart", "one")
    assert (done.returncode, "run `mountctl recover" in done.stderr) == (10, True)
    os.kill(facts["server_pid"], signal.SIGKILL)
    wait_until(lambda: "one: dead" in mountctl("status", "one").stdout)
    done = mountctl("recover", "one")
    assert (done.returncode, "its server has ended as well" in done.stderr) == (10, True), done.stderr
    assert "unmount it with `trimsfs umount" in done.stderr
    assert mountctl("up", "one").returncode == 0
    assert mountctl("status", "one").returncode == 0


def test_upgrade_to_options_that_do_not_work_leaves_the_server_as_it_is(
    mountctl: Mountctl, declared: Path, store_directory: Path, tmp_path: Path
) -> None:
    (store_directory / "model").write_bytes(b"weights")
    mountpoint, file = declare(declared, "one", store_directory, tmp_path), declared / "one.toml"
    text = file.read_text()
    assert mountctl("up").returncode == 0
    before = json.loads(mountctl("status", "one", "--json").stdout)[0]["server_pid"]
    for changed, words in (
        (f'{text}\nserver_user = "nobody-of-this-name"', "no such user"),
        (text.replace("cache-one", "cache-two"), "cannot be changed while it is mounted"),
    ):
        file.write_text(changed)
        done = mountctl("upgrade", "one")
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr
    assert json.loads(mountctl("status", "one", "--json").stdout)[0]["server_pid"] == before
    file.write_text(f"{text}\nmetadata_ttl = 7")
    assert mountctl("upgrade", "one").returncode == 0
    assert json.loads((mountpoint / ".trims/control").read_text())["options"]["metadata_ttl"] == 7
    assert (mountpoint / "model").read_bytes() == b"weights"


def test_one_file_that_cannot_be_used_does_not_keep_the_others_from_anything(
    mountctl: Mountctl, declared: Path, store_directory: Path, tmp_path: Path
) -> None:
    mountpoint = declare(declared, "one", store_directory, tmp_path)
    (declared / "another.toml").write_text("mountpoint = ")
    done = mountctl("up")
    assert (done.returncode, "not valid TOML" in done.stderr) == (2, True)
    assert "one: serving" in mountctl("status").stdout
    assert mountctl("status", mountpoint).returncode == 0
    (declared / "third.toml").write_text(f'mountpoint = "{mountpoint}"\nstore = "/elsewhere"')
    done = mountctl("up", "third")
    assert (done.returncode, "not /elsewhere" in done.stderr) == (4, True)
    assert again_while_copied(lambda: mountctl("down", mountpoint)).returncode == 0


def test_mount_and_umount_know_the_type(store_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mount(8) finds its helper where libmount looks, /sbin; the test puts a link there for its time."""
    helper = Path("/sbin/mount.trimsfs")
    if helper.exists() or helper.is_symlink():
        pytest.skip("trimsfs is installed here")
    (store_directory / "model").write_bytes(b"weights")
    mountpoint = tmp_path / "models with space"
    mountpoint.mkdir()
    table = tmp_path / "fstab"
    options = f'ro,cache_dir="{tmp_path / "cache,1"}",log-file={tmp_path / "log"},x-systemd.automount,nofail'
    escaped = str(mountpoint).replace(" ", "\\040")
    table.write_text(f"# models\n\n  {store_directory}\t {escaped}   trimsfs\t{options}   0   0\n")
    environment = os.environ | {"TRIMSFS_CONFIG": "/dev/null"}
    helper.symlink_to(BIN / "mount.trimsfs")
    try:
        command = ["mount", "-T", str(table), str(mountpoint)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        assert (mountpoint / "model").read_bytes() == b"weights"
        assert (tmp_path / "cache,1/index.sqlite").exists()
        umount(mountpoint)
        command = ["mount", "-t", "trimsfs", str(store_directory), str(mountpoint), "-o", "bogus=1"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert "mount option bogus=1: there is no such option" in done.stderr
        assert done.returncode != 0
    finally:
        helper.unlink()
        trimsfs("umount", "--lazy", mountpoint)
