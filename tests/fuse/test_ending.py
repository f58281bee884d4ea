"""Mounts that end late: who unmounts does not wait for ever, and another at the same place is left alone."""

import os
import signal
from pathlib import Path

import pytest

from mountctl.keeper.control_socket import ask
from tests.support import lingering
from tests.support.keepers import have_serve
from tests.support.mounts import LAZY, mounted, trimsfs, wait_until
from tests.support.processes import alive
from trimsfs.mountinfo import mount_at


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
        done = trimsfs("umount", mount.path)
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
