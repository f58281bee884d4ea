"""Mounting, unmounting, and what goes wrong with them."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.mounts import (
    TRIMSFS,
    MountedStore,
    OwnDirectory,
    again_while_copied,
    let_in,
    mountctl,
    mounted,
    trimsfs,
    unmount,
    wait_until,
)
from tests.support.processes import alive, run
from tests.support.users import STRANGER
from trimsfs.mountinfo import escape, mount_at

AS_NOBODY = [
    # fusermount3 wants a user of the password file. The interpreter may lie in root's home: only reading is
    # allowed beyond what any user may.
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--bounding-set=-all,+dac_read_search,+sys_admin,+setuid,+setgid,+dac_override", "--inh-caps=+dac_read_search"),
    "--ambient-caps=+dac_read_search",
]


def test_mount_is_read_only_and_honours_neither_set_uid_nor_devices(module_mount: OwnDirectory) -> None:
    line = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(module_mount.path) in line)
    assert {"ro", "nosuid", "nodev", "default_permissions", "allow_other"} <= set(line.split()[3].split(","))
    assert line.split()[2] == "fuse.trimsfs"


def test_read_ahead_is_deep(module_mount: OwnDirectory) -> None:
    mount = mount_at(module_mount.path)
    assert mount is not None
    assert Path(f"/sys/class/bdi/{mount.device}/read_ahead_kb").read_text() == "16384\n"


def test_umount_ends_server_and_keeper_and_frees_the_cache(store_directory: Path, tmp_path: Path) -> None:
    for _ in range(2):
        with mounted(store_directory, tmp_path) as mount:
            facts = mount.control()
        assert mount_at(mount.path) is None
        assert not alive(facts["server_pid"])
        assert not alive(facts["keeper_pid"])


@pytest.mark.parametrize(
    ("prepare", "options", "code", "message"),
    [
        (
            lambda path: (path.rmdir(), path.parent.joinpath("models").symlink_to("/nonexistent/models")),
            (),
            4,
            "/nonexistent does not exist: create it",
        ),
        (lambda path: (path / "file").touch(), (), 4, "is not empty"),
        (None, ("--store", "/nonexistent/store"), 5, "/nonexistent/store does not exist"),
        (None, ("--store", "s3:/bucket/a"), 2, "write s3://bucket/a"),
        (None, ("--store", "no-such-bucket"), 5, "a bucket is written s3://no-such-bucket"),
        (None, ("--store", "s3//bucket/models"), 5, "a bucket is written s3://bucket/models"),
        (None, ("--store", "gopher://x"), 2, "Protocol not known: gopher"),
        (None, ("--store", "S3://models/a"), 2, "a scheme is in lower case: write s3://models/a"),
        (None, ("--cache-size", "10"), 2, "is 10 bytes, which hold no model: write a unit, as in 10GiB"),
        (None, ("--store", "s3:///prefix"), 2, "is not a bucket name"),
        (None, ("--cache-dir", "/proc/trimsfs"), 9, "/proc/trimsfs"),
        (None, ("--cache-size", "many"), 2, "--cache-size many"),
        (None, ("--mode", "999"), 2, "not an octal number"),
        (None, ("--config", "/nonexistent.toml"), 2, "/nonexistent.toml"),
    ],
)
def test_what_cannot_be_mounted_gives_one_line_and_its_exit_code(
    prepare: Callable[[Path], None] | None,
    options: tuple[str, ...],
    code: int,
    message: str,
    store_directory: Path,
    tmp_path: Path,
) -> None:
    mountpoint = tmp_path / "models"
    mountpoint.mkdir()
    if prepare is not None:
        prepare(mountpoint)

    done = trimsfs("mount", mountpoint, "--store", store_directory, "--cache-dir", tmp_path / "cache", *options)

    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert mount_at(mountpoint) is None


@pytest.mark.parametrize("verb", ["umount", pytest.param("unmount", marks=pytest.mark.slow)])
def test_a_store_can_be_named_before_the_mount_point_which_is_made(
    verb: str, store_directory: Path, tmp_path: Path
) -> None:
    (store_directory / "params").write_bytes(b"weights")
    mountpoint = tmp_path / "models"
    done = trimsfs("mount", store_directory, mountpoint, "--cache-dir", tmp_path / "cache")
    try:
        assert done.returncode == 0, done.stderr
        assert (mountpoint / "params").read_bytes() == b"weights"
    finally:
        ended = again_while_copied(lambda: trimsfs(verb, mountpoint))
    assert ended.returncode == 0, ended.stderr
    twice = trimsfs("mount", store_directory, mountpoint, "--store", "/other")
    assert (twice.returncode, "give one of them" in twice.stderr) == (2, True)
    for verb_of_two in ("mount", "serve"):
        nowhere = trimsfs(verb_of_two)
        assert (nowhere.returncode, "Missing argument 'MOUNTPOINT'" in nowhere.stderr) == (2, True), nowhere.stderr
    failed = trimsfs("mount", "/nonexistent", tmp_path / "new", "--cache-dir", tmp_path / "cache")
    assert (failed.returncode, (tmp_path / "new").exists()) == (5, False)


def test_swapped_arguments_are_told(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "params").touch()
    url = trimsfs("mount", tmp_path / "models", "s3://bucket/a")
    assert (url.returncode, f"`trimsfs mount s3://bucket/a {tmp_path / 'models'}`" in url.stderr) == (2, True)
    directory = trimsfs("mount", tmp_path / "models", store_directory)
    swapped = f"`trimsfs mount {store_directory} {tmp_path / 'models'}`"
    assert (directory.returncode, swapped in directory.stderr) == (4, True)


def test_a_store_without_a_mount_point_is_told(store_directory: Path) -> None:
    (store_directory / "params").touch()
    done = trimsfs("mount", store_directory)
    remedy = f"if it is the store, write `trimsfs mount {store_directory} MOUNTPOINT`, else choose another\n"
    assert (done.returncode, done.stderr.endswith(remedy), done.stderr.count("\n")) == (4, True, 1), done.stderr


def test_mounting_twice_is_refused(tmp_path: Path, module_mount: OwnDirectory) -> None:
    done = trimsfs("mount", module_mount.path, "--store", module_mount.store, "--cache-dir", tmp_path / "other")

    assert (done.returncode, "already mounted" in done.stderr) == (4, True)


def test_cache_directory_in_use_is_refused(tmp_path: Path, module_mount: OwnDirectory) -> None:
    other = tmp_path / "other"
    other.mkdir()

    done = trimsfs("mount", other, "--store", module_mount.store, "--cache-dir", module_mount.mount.cache)

    assert done.returncode == 8
    server = module_mount.mount.control()["server_pid"]
    holder = f"pid {server} (trimsfs server {module_mount.mount.path})"
    assert f"{module_mount.mount.cache} is in use by another server, {holder}: unmount that" in done.stderr
    assert mount_at(other) is None


def test_without_dev_fuse_the_error_says_what_to_do(store_directory: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "models"
    mountpoint.mkdir()
    command = f"mount -t tmpfs none /dev && exec {TRIMSFS} mount {mountpoint} --store {store_directory}"

    done = run("unshare", "-m", "sh", "-c", command)

    assert (done.returncode, "modprobe fuse" in done.stderr) == (3, True), done.stderr


def test_options_come_from_file_and_environment(store_directory: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('mode = "0400"\nuid = 7\ncache_size = "1GiB"\n')
    with mounted(
        store_directory, tmp_path, "--uid", "9", environment={"TRIMSFS_CONFIG": str(config), "TRIMSFS_GID": "8"}
    ) as mount:
        status = mount.path.stat()
        options = mount.control()["options"]

    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o500, 9, 8)
    assert options["cache_size"] == 1 << 30


def test_umount_of_something_else_is_refused(tmp_path: Path) -> None:
    done = trimsfs("umount", tmp_path)

    assert (done.returncode, "no trimsfs mount" in done.stderr) == (10, True)


def test_busy_mount_stays_until_it_is_detached(store_directory: Path, directory_mount: MountedStore) -> None:
    (store_directory / "model").write_bytes(b"weights")
    facts = directory_mount.control()
    with (directory_mount.path / "model").open("rb", buffering=0) as file:
        done = trimsfs("umount", directory_mount.path)
        assert (done.returncode, "is in use" in done.stderr) == (12, True)
        assert trimsfs("umount", "--lazy", directory_mount.path).returncode == 0
        assert mount_at(directory_mount.path) is None
        assert file.read() == b"weights"
    wait_until(lambda: not alive(facts["keeper_pid"]))


def test_terminated_keeper_unmounts(store_directory: Path, directory_mount: MountedStore) -> None:
    """Also what is in use, and logs by whom."""
    (store_directory / "model").write_bytes(b"weights")
    facts = directory_mount.control()
    with (directory_mount.path / "model").open("rb"):
        os.kill(facts["keeper_pid"], signal.SIGTERM)
        wait_until(lambda: not alive(facts["keeper_pid"]))
    assert mount_at(directory_mount.path) is None
    assert not alive(facts["server_pid"])
    assert f"{directory_mount.path}: is in use by pid {os.getpid()} (" in directory_mount.log()


@pytest.fixture
def run_directory() -> Iterator[None]:
    """What a login has made for the user nobody: not on every host may that user write to /tmp."""
    directory = Path("/run/user/65534")
    made = [each for each in (directory.parent, directory) if not each.exists()]
    for each in made:
        each.mkdir(mode=0o755)
    if directory in made:
        os.chown(directory, 65534, 65534)
    yield
    for each in reversed(made):
        shutil.rmtree(each)


@pytest.mark.usefixtures("run_directory")
@pytest.mark.alone  # lists all mounts of the host, and some are not for this user
def test_unprivileged_user_mounts_through_fusermount3(store_directory: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    models = home / ".local/share/trimsfs/models"
    mountpoint = home / "models"
    for directory in (home, home / ".local", home / ".local/share", models.parent, models, mountpoint):
        directory.mkdir()
        os.chown(directory, 65534, 65534)
    (models / "model").write_bytes(b"weights")
    environment = {**os.environ, "HOME": str(home), "TRIMSFS_CONFIG": "/dev/null"}

    def as_user(*command: str | Path) -> "subprocess.CompletedProcess[str]":
        return run(*AS_NOBODY, *command, env=environment)

    mode = Path("/dev/fuse").stat().st_mode
    Path("/dev/fuse").chmod(0o666)  # as udev leaves it on any host that has udev
    try:
        done = as_user(TRIMSFS, "mount", mountpoint)
        assert done.returncode == 0, done.stderr
        assert as_user("cat", mountpoint / "model").stdout == "weights"
        assert as_user(TRIMSFS, "ls").returncode == 0
        assert (home / ".cache/trimsfs").is_dir()
        (facts,) = json.loads(mountctl("status", "--json", mountpoint).stdout)
        assert (facts["state"], facts["keeper_pid"] > 1, facts["restarts"]) == ("serving", True, 0), "root asks as well"
        done = mountctl("restart", mountpoint)
        assert (done.returncode, done.stderr) == (0, "")
        assert as_user("cat", mountpoint / "model").stdout == "weights"
        os.kill(facts["keeper_pid"], signal.SIGSTOP)
        done = mountctl("status", mountpoint)
        os.kill(facts["keeper_pid"], signal.SIGCONT)
        assert f"the keeper is stopped (pid {facts['keeper_pid']})" in done.stdout
        again = as_user(TRIMSFS, "umount", mountpoint)
        assert again.returncode == 0, again.stderr
        assert mount_at(mountpoint) is None
    finally:
        if mount_at(mountpoint) is not None:
            subprocess.run(["umount", "-l", mountpoint], check=True)
        Path("/dev/fuse").chmod(mode)


def test_a_mount_that_can_keep_nothing_says_so(store_directory: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "models"
    mountpoint.mkdir()
    arguments = ("mount", mountpoint, "--store", store_directory, "--cache-dir", tmp_path / "cache")
    try:
        done = trimsfs(*arguments, "--min-free", "100TiB")
        assert (done.returncode, "models are not cached" in done.stderr) == (0, True)
    finally:
        unmount(mountpoint)


@pytest.mark.alone  # asks all mounts of the host
def test_doctor_tells_what_is_well_and_what_to_do(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(b"weights")
    good = trimsfs("doctor", "--store", store_directory, "--cache-dir", tmp_path / "cache")
    bad = trimsfs("doctor", "--store", "/nonexistent", "--cache-dir", tmp_path / "cache", "--share-chunks")

    assert good.returncode == 0, good.stdout
    told = good.stdout.splitlines()
    assert [line for line in told if not line.startswith("ok ") and "  locked memory: " not in line] == []
    assert bad.returncode == 1
    assert "sharing: " in bad.stdout
    assert "FAIL  store: store directory /nonexistent does not exist: is it mounted" in bad.stdout
    assert not (tmp_path / "cache").exists()


def test_doctor_tries_a_mount_beside_a_cache_of_another_server_user_and_leaves_no_log(
    store_directory: Path, tmp_path: Path
) -> None:
    cache, scratch = tmp_path / "cache", tmp_path / "scratch"
    for directory in (cache, scratch):
        directory.mkdir(mode=0o700)
    os.chown(cache, STRANGER, STRANGER)
    let_in(tmp_path)
    arguments = ("--store", store_directory, "--cache-dir", cache, "gpu=off")
    done = trimsfs("doctor", *arguments, environment={"TMPDIR": str(scratch)})
    assert "\nok    passthrough: " in done.stdout
    assert list(Path("/var/log/trimsfs").glob(f"*{escape(tmp_path)}*")) == []
