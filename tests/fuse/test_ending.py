"""Mounts that end late: who unmounts does not wait for ever, and another at the same place is left alone."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mountctl.keeper.control_socket import ask
from mountctl.linux.cdi_specs import default_output
from tests.support import lingering
from tests.support.keepers import have_serve
from tests.support.mounts import LAZY, again_while_copied, mountctl, mounted, trimsfs, wait_until
from tests.support.processes import alive
from tests.support.tmpfs import tmpfs
from trimsfs.mount_namespaces import detach
from trimsfs.mountinfo import mount_at, mounts


@pytest.mark.parametrize(
    "stopped", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["ends", "has to be ended"]
)
def test_a_mount_that_ends_late_leaves_the_next_at_its_place_alone(
    stopped: bool, store_directory: Path, tmp_path: Path
) -> None:
    """Also if its server does not answer, so that its connection is aborted."""
    (store_directory / "model").write_bytes(b"weights")
    with mounted(store_directory, tmp_path) as mount:
        before = mount.control()
        with (mount.path / "model").open("rb", buffering=0):
            assert trimsfs("umount", LAZY, mount.path).returncode == 0
            with mounted(store_directory, tmp_path, "--cache-dir", str(tmp_path / "other")):
                if stopped:
                    os.kill(before["server_pid"], signal.SIGSTOP)
                os.kill(before["keeper_pid"], signal.SIGTERM)
                wait_until(lambda: not alive(before["keeper_pid"]), 30)
                assert not alive(before["server_pid"])
                assert (mount.path / "model").read_bytes() == b"weights"
                facts = ask(mount.path, {"do": "status"}, timeout_s=5)
                assert facts["keeper_pid"] == mount.control()["keeper_pid"] != before["keeper_pid"]


@pytest.mark.slow
def test_a_server_that_does_not_end_does_not_hold_up_who_unmounts(store_directory: Path, tmp_path: Path) -> None:
    with mounted(store_directory, tmp_path) as mount:
        have_serve(lingering, mount, store_directory)
        facts = mount.control()
        done = again_while_copied(lambda: trimsfs("umount", mount.path))
        assert (done.returncode, done.stderr) == (0, "")
        assert not alive(facts["server_pid"])
        assert not alive(facts["keeper_pid"])
        assert f"unmounted, but server {facts['server_pid']} has not ended in 10 s: killing it" in mount.log()


@pytest.mark.slow
def test_a_server_that_does_not_end_takes_no_later_mount_with_it(store_directory: Path, tmp_path: Path) -> None:
    """The kernel gives the next file system the same device number."""
    with mounted(store_directory, tmp_path) as mount:
        have_serve(lingering, mount, store_directory)
        before = mount.control()
        assert trimsfs("umount", LAZY, mount.path).returncode == 0
        with mounted(store_directory, tmp_path, "--cache-dir", str(tmp_path / "other")):
            assert alive(before["server_pid"])
            wait_until(lambda: not alive(before["keeper_pid"]), 30)
            assert mount_at(mount.path) is not None
            assert mount.control()["keeper_pid"] != before["keeper_pid"]


@pytest.mark.alone  # its namespace holds copies of others' mounts
def test_who_unmounts_is_told_what_has_it_elsewhere_and_can_have_it_unmounted_there(
    store_directory: Path, tmp_path: Path
) -> None:
    (store_directory / "model").write_bytes(b"weights")
    bind = tmp_path / "bind"
    bind.mkdir()
    program = ("unshare", "-m", "sh", "-c", 'exec 3<"$1"; read _; echo; read _; exec 3<&-; echo; exec sleep 300', "sh")
    with mounted(store_directory, tmp_path) as mount, running(*program, mount.path / "model") as process:
        facts = mount.control()
        next_step(process)
        told = f"is in use by the mount at {mount.path} in the mount namespace of pid {process.pid} ("
        refused = trimsfs("umount", mount.path)
        assert (refused.returncode, told in refused.stderr, "--everywhere" in refused.stderr) == (12, True, True)
        assert (mount.path / "model").read_bytes() == b"weights"
        busy = trimsfs("umount", "--everywhere", mount.path)
        assert (busy.returncode, f"is in use by pid {process.pid} (sh)" in busy.stderr) == (12, True)
        next_step(process)

        subprocess.run(["mount", "--bind", mount.path, bind], check=True)
        assert f"is in use by the mount at {bind}, the mount at " in trimsfs("umount", mount.path).stderr
        assert trimsfs("umount", bind).returncode == 0, "a bind goes by itself"
        subprocess.run(["mount", "--bind", mount.path, bind], check=True)
        with slow_to_free(tmp_path) as environment:
            done = mountctl("down", "--everywhere", mount.path, environment=environment)
        assert (done.returncode, done.stderr) == (0, "")
        left = [*mounts(), *mounts(process=process.pid)]
        assert not [each for each in left if each.mountpoint in {mount.path, bind}]
        assert not alive(facts["server_pid"])
        assert process.poll() is None


@pytest.mark.alone  # its namespace holds copies of others' mounts
def test_an_overlay_keeps_a_mount_and_is_named_but_not_one_that_is_older(store_directory: Path, tmp_path: Path) -> None:
    """Its namespace does not list the mount: the overlay alone leads there, as with podman's volumes with ``:O``."""
    (store_directory / "bert").mkdir()
    (store_directory / "bert/params").write_bytes(b"weights")
    merged = tmp_path / "merged"
    merged.mkdir()
    script = 'mount -t overlay overlay -o "lowerdir=$1" "$2"; umount --lazy "$3"; echo; exec sleep 300'
    with (
        mounted(store_directory, tmp_path) as mount,
        tmpfs(tmp_path / "second", 1 << 20) as second,
        running(
            "unshare", "-m", "sh", "-ec", script, "sh", f"{mount.path}/bert:{second}", merged, mount.path
        ) as process,
    ):
        keeper = mount.control()["keeper_pid"]
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        told = f"in use by the overlay at {merged} in the mount namespace of pid {process.pid} (sleep)"
        for option in ((), ("--everywhere",)):
            refused = trimsfs("umount", *option, mount.path)
            assert (refused.returncode, refused.stderr) == (
                12,
                f"trimsfs: {mount.path} is {told}: end that, or use --lazy\n",
            )
        assert (mount.path / "bert/params").read_bytes() == b"weights"
        lazy = trimsfs("umount", LAZY, mount.path)
        assert (lazy.returncode, told in lazy.stderr) == (0, True), lazy.stderr
        with mounted(store_directory, tmp_path, "--cache-dir", str(tmp_path / "other")):
            done = trimsfs("umount", mount.path)
            assert (done.returncode, done.stderr) == (0, ""), "the overlay is of the mount before"
        assert alive(keeper)
        assert Path(f"/proc/{process.pid}/root{merged}/params").read_bytes() == b"weights"
        process.kill()
        wait_until(lambda: not alive(keeper), 30)


def test_a_bind_that_a_lazy_unmount_leaves_is_named(store_directory: Path, tmp_path: Path) -> None:
    bind = tmp_path / "bind"
    bind.mkdir()
    with mounted(store_directory, tmp_path) as mount:
        subprocess.run(["mount", "--bind", mount.path, bind], check=True, timeout=30)
        try:
            lazy = trimsfs("umount", LAZY, mount.path)
            assert (lazy.returncode, f"it is in use by the mount at {bind}" in lazy.stderr) == (0, True), lazy.stderr
        finally:
            subprocess.run(["umount", bind], check=True, timeout=30)


@pytest.mark.alone  # namespaces of others would hold copies of its mount
def test_who_holds_a_mount_for_a_moment_does_not_keep_it(store_directory: Path, tmp_path: Path) -> None:
    """As an exporter does, which reads the metrics of all mounts."""
    (store_directory / "model").write_bytes(b"weights")
    with (
        mounted(store_directory, tmp_path) as mount,
        running("sh", "-c", 'exec 3<"$1"; echo; read _', "sh", mount.path / "model") as holder,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == "\n"
        program, told = tmp_path / "umount", tmp_path / "told"
        program.write_text(
            f'#!/bin/sh\n{shutil.which("umount")} "$@" 2> {told} && exit\nstate=$?\ncat {told} >&2\n'
            f"kill -KILL {holder.pid}\nexit $state\n"
        )
        program.chmod(0o755)
        done = trimsfs("umount", mount.path, environment={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
        assert (done.returncode, done.stderr) == (0, "")
        assert holder.wait(5) == -signal.SIGKILL, "it was there at first"


def test_what_is_still_used_after_a_lazy_unmount_is_named_there_and_at_the_next_mount(
    store_directory: Path, tmp_path: Path
) -> None:
    (store_directory / "model").write_bytes(b"weights")
    own = f"in use by pid {os.getpid()} ("
    with mounted(store_directory, tmp_path) as mount:
        keeper = mount.control()["keeper_pid"]
        with (mount.path / "model").open("rb"):
            lazy = trimsfs("umount", LAZY, mount.path)
            assert (lazy.returncode, own in lazy.stderr) == (0, True)
            again = trimsfs("mount", mount.path, "--store", store_directory, "--cache-dir", mount.cache)
            assert (again.returncode, own in again.stderr) == (8, True), again.stderr
        wait_until(lambda: not alive(keeper))


def test_what_is_at_a_place_by_now_in_place_of_a_mount_is_not_unmounted() -> None:
    proc = mount_at(Path("/proc"))
    assert proc is not None
    with pytest.raises(OSError, match="Stale"):
        detach(os.getpid(), replace(proc, number=1))
    assert mount_at(Path("/proc")) == proc


@contextmanager
def slow_to_free(directory: Path) -> Iterator[dict[str, str]]:
    """An environment in which `umount` has done its work long before it ends, as with a million names."""
    program, number = directory / "umount", directory / "number"
    program.write_text(f'#!/bin/sh\n{shutil.which("umount")} "$@" || exit\necho $$ > {number}\nexec sleep 300\n')
    program.chmod(0o755)
    yield os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"}
    os.kill(int(number.read_text()), signal.SIGKILL)


def next_step(process: "subprocess.Popen[str]") -> None:
    """Have the program of a test go on, and wait until it has."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "\n"


@contextmanager
def running(*command: str | Path) -> Iterator["subprocess.Popen[str]"]:
    """A process for the length of the block."""
    with subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_devices_of_a_mount_go_with_it(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "bert").mkdir()
    with mounted(store_directory, tmp_path) as mount:
        spec = default_output(mount.path)
        done = mountctl("cdi", mount.path)
        assert (done.returncode, spec.exists()) == (0, True), done.stderr
    wait_until(lambda: not spec.exists())


def test_publishers_commands_on_a_mount_name_its_store(store_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/params").write_bytes(b"weights")
    (store_directory / "m").mkdir()
    with mounted(store_directory, tmp_path / "w") as mount:
        done = trimsfs("push", tmp_path / "model", f"{mount.path}/m:v1")
        told = f"{mount.path} is a mount of trimsfs, which never takes writes: name its store, {store_directory}\n"
        assert (done.returncode, done.stderr.endswith(told)) == (6, True), done.stderr
        name = f"{mount.path}/m"
        for arguments in (
            ("versions", name),
            ("alias", name, "prod", "v1"),
            ("rollback", name, "prod"),
            ("rm", f"{name}:v1"),
            ("diff", f"{name}:v1", f"{name}:v2"),
        ):
            done = trimsfs(*arguments)
            assert (done.returncode, done.stderr.endswith(told)) == (6, True), done.stderr
