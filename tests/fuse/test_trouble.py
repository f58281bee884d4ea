"""What would hang a mount or leave one behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.keepers import hanging
from tests.support.mounts import TRIMSFS, MountedStore, mountctl, mounted, trimsfs, unmount, wait_until
from tests.support.processes import alive, run
from trimsfs.mountinfo import mount_at

_READ_CALLS = {"0", "19"}
"""read and readv on x86-64."""


def reads_fuse(pid: int) -> bool:
    """Whether the main thread of a server is in a blocking read of /dev/fuse."""
    call = Path(f"/proc/{pid}/syscall").read_text().split()
    if call[0] not in _READ_CALLS:
        return False
    try:
        return os.readlink(f"/proc/{pid}/fd/{int(call[1], 16)}") == "/dev/fuse"
    except FileNotFoundError:
        return False


KILLED_WHILE_THEY_ASK = """
import os, random, signal, sys, time

draw = random.Random(1)
for _ in sys.stdin:  # a line for each time
    askers = []
    for _ in range(3):
        asker, number = os.fork(), 0
        while asker == 0:
            number += 1
            os.path.exists(f"{sys.argv[1]}/absent-{os.getpid()}-{number}")
        askers.append(asker)
    time.sleep(draw.uniform(0.002, 0.02))
    for asker in askers:
        os.kill(asker, signal.SIGKILL)
        os.waitpid(asker, 0)
    print("killed", flush=True)
"""
"""In a small process, of which copies are soon made."""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows system calls by number")
def test_processes_killed_while_they_ask_do_not_stop_the_server(directory_mount: MountedStore) -> None:
    """The kernel takes back what a killed process asked, maybe just before the server reads it."""
    server = directory_mount.control()["server_pid"]
    command = [sys.executable, "-c", KILLED_WHILE_THEY_ASK, str(directory_mount.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for _ in range(25):
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "killed\n"
            wait_until(lambda: not reads_fuse(server), timeout_s=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda mountpoint: ("--cache-dir", mountpoint / "cache"), "lies on the mount point"),
        (lambda mountpoint: ("--log-file", mountpoint / "log"), "lies on the mount point"),
        (lambda mountpoint: ("--cache-dir", mountpoint.parent / "store/cache"), "lies in the store"),
        (lambda mountpoint: ("--store", mountpoint), "overlap"),
        (lambda mountpoint: ("--store", mountpoint.parent), "overlap"),
        (lambda mountpoint: ("--store", f"file://{mountpoint}"), "overlap"),
    ],
)
def test_mount_that_would_need_itself_is_refused(
    options: Callable[[Path], tuple[str | Path, ...]], message: str, store_directory: Path, tmp_path: Path
) -> None:
    mountpoint = tmp_path / "models"
    mountpoint.mkdir()

    done = trimsfs(
        *("mount", mountpoint, "--store", store_directory, "--cache-dir", tmp_path / "cache"), *options(mountpoint)
    )

    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert mount_at(mountpoint) is None


def foreground(mountpoint: Path, store: str | Path, *options: str | Path) -> "subprocess.Popen[str]":
    command: list[str | Path] = [TRIMSFS, "mount", mountpoint, "--foreground", "--store", store, *options]
    command += ["--cache-dir", mountpoint.parent / "cache"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_foreground_mount_logs_to_its_terminal_and_goes_with_it(
    number: signal.Signals, store_directory: Path, tmp_path: Path
) -> None:
    mountpoint, log = tmp_path / "models", tmp_path / "log"
    mountpoint.mkdir()
    process = foreground(mountpoint, store_directory, "--log-file", log)
    try:
        wait_until(lambda: mount_at(mountpoint) is not None)
        assert os.listdir(mountpoint) == []
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=20)
        assert mount_at(mountpoint) is None
    finally:
        process.kill()
        unmount(mountpoint)
    assert process.returncode == 0 or number == signal.SIGHUP, errors
    assert f"serving {store_directory}" in errors
    assert "Traceback" not in errors
    told = f"option --log-file {log}: not written with --foreground, which logs to the terminal"
    assert (f"trimsfs: warning: {told}\n" in errors, log.exists()) == (True, False)


def test_foreground_mount_that_fails_exits_as_one_in_the_background(tmp_path: Path) -> None:
    mountpoint = tmp_path / "models"
    mountpoint.mkdir()
    process = foreground(mountpoint, "/nonexistent/store")
    _, errors = process.communicate(timeout=20)

    assert process.returncode == 5
    assert "/nonexistent/store does not exist" in errors
    assert "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.alone  # asks all mounts of the host
def test_server_that_stands_still_can_be_told_and_got_rid_of(directory_mount: MountedStore) -> None:
    facts = directory_mount.control()
    with hanging(directory_mount):
        place = directory_mount.path
        with ThreadPoolExecutor() as pool:
            verbs = [("status", "--json"), ("status", place), ("ls",), ("warm", place)]
            status, alone, listed, warm = pool.map(lambda verb: trimsfs(*verb, timeout_s=40), verbs)
        (shown,) = [one for one in json.loads(status.stdout) if one["mountpoint"] == str(place)]
        assert "does not answer" in shown["error"]
        assert (alone.returncode, "`mountctl restart" in alone.stdout, "abort" in alone.stdout) == (2, True, False)
        assert (listed.returncode, f"left out: {place} does not answer" in listed.stderr) == (10, True)
        assert warm.returncode == 10
        done = mountctl("abort", directory_mount.path, timeout_s=20)
        assert done.returncode == 0, done.stderr
        # The keeper unmounts as well, once it finds that the server does not answer.
        assert trimsfs("umount", "--lazy", directory_mount.path, timeout_s=40).returncode in {0, 10}
        assert mount_at(directory_mount.path) is None
    wait_until(lambda: not alive(facts["keeper_pid"]), timeout_s=20)


def test_names_are_shown_as_they_are(store_directory: Path, directory_mount: MountedStore) -> None:
    name = "llama[v2] [/b]"  # markup to rich, with a slash to the file system
    (store_directory / name).mkdir(parents=True)
    (store_directory / name / "params").write_bytes(b"weights")

    assert name in trimsfs("ls", "-r", directory_mount.path).stdout
    assert trimsfs("warm", directory_mount.path / name).returncode == 0


def test_root_without_sysfs_can_mount(store_directory: Path, tmp_path: Path) -> None:
    mountpoint = tmp_path / "models"
    mountpoint.mkdir()
    mount = f"{TRIMSFS} mount {mountpoint} --store {store_directory} --cache-dir {tmp_path / 'cache'}"
    script = f"umount -l /sys && {mount} && ls {mountpoint} && {TRIMSFS} umount {mountpoint}"

    done = run("unshare", "-m", "sh", "-c", script)

    assert done.returncode == 0, done.stderr


@pytest.mark.alone  # asks all mounts of the host
def test_one_mount_that_fails_does_not_hide_the_others(
    store_directory: Path, tmp_path: Path, directory_mount: MountedStore
) -> None:
    (store_directory / "model").write_bytes(b"weights")
    with mounted(store_directory, tmp_path / "dead") as dead:
        os.kill(dead.control()["keeper_pid"], signal.SIGKILL)
        os.kill(dead.control()["server_pid"], signal.SIGKILL)
        alone = trimsfs("status", dead.path)
        done = trimsfs("ls")
        again = trimsfs("mount", dead.path, "--store", store_directory)

        assert alone.returncode == 2
        assert (done.returncode, f"left out: {dead.path}" in done.stderr) == (10, True)
        assert str(directory_mount.path / "model") in done.stdout
        assert "its server is gone" in again.stderr
        assert trimsfs("doctor", "--store", store_directory, "--cache-dir", tmp_path / "cache").returncode == 1
