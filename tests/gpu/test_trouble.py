"""Devices and drivers that fail, or are not there: clear errors, and a file system that goes on."""

import errno
import json
import os
from pathlib import Path

import pytest

from tests.cuda import environment
from tests.gpu.scene import MIB, NOWHERE, Scene, digest_of
from tests.support.mounts import mounted, trimsfs, wait_until


def test_a_device_that_is_lost_is_told_and_the_others_go_on(host: Scene, store: Path) -> None:
    holder = host.borrowing()
    host.kernel.devices[0].lose()

    assert host.refused("other.bin") == host.refused() == errno.EIO
    assert holder.ask("again")["errno"] == errno.ESTALE
    (facts, _) = host.mount.control()["gpu"]["devices"]
    assert "mountctl restart" in facts["failure"]
    assert facts["used_bytes"] == 0
    told = trimsfs("status", host.mount.path).stdout
    assert f"{host.device} (Emulated device 0, no GPU): failed: " in told
    assert "check `nvidia-smi`" in told
    assert host.file("net.bin").read_bytes() == (store / "net.bin").read_bytes()
    assert host.borrowing("net.bin", host.devices[1]).digest() == digest_of(store)
    assert host.mount.log().count("has failed") == 1
    host.kernel.devices[0].restore()
    host.kill_server()
    wait_until(lambda: len(host.mount.control()["gpu"]["devices"]) == 2)
    assert host.borrowing().digest() == digest_of(store)


def test_a_device_that_is_lost_while_it_is_filled_fails_whoever_waits(host: Scene, store: Path) -> None:
    program = host.program()
    with host.kernel.devices[0].paused():
        program.tell("control_file", path=host.control_file())
        host.wait_until_loading()
        host.kernel.devices[0].lose()
    assert program.answer()["errno"] == errno.EIO
    assert host.file("net.bin").read_bytes() == (store / "net.bin").read_bytes()


@pytest.mark.parametrize(
    ("option", "driver", "reason"),
    [
        ("auto", False, "no CUDA driver: libcuda.so.1"),
        ("auto", True, "no CUDA device: cuInit: CUDA_ERROR_NO_DEVICE"),
        ("off", True, 'switched off by gpu = "off"'),
    ],
)
def test_a_mount_without_a_device_tells_why(
    option: str, driver: bool, reason: str, store: Path, tmp_path: Path
) -> None:
    variables = environment(None) if driver else {}
    with mounted(store, tmp_path / "mount", f"gpu={option}", environment=variables) as mount:
        for arguments in (("warm", mount.path, "--to", "gpu"), ("verify", mount.path, "--tier", "gpu")):
            done = trimsfs(*arguments)
            assert (done.returncode, f"{mount.path} uses no GPU: {reason}" in done.stderr) == (15, True), done.stderr
        assert f"  gpu         none: {reason}" in trimsfs("status", mount.path).stdout
        assert "GPU" not in trimsfs("ls", mount.path).stdout
        assert [model["gpu"] for model in json.loads(trimsfs("ls", mount.path, "--json").stdout)] == [{}, {}]
        with pytest.raises(FileNotFoundError):
            os.open(mount.path / ".trims/net.bin/gpu" / NOWHERE, os.O_RDONLY)
        assert "gpu" not in os.listdir(mount.path / ".trims/net.bin")
        assert (mount.path / "net.bin").read_bytes() == (store / "net.bin").read_bytes()


def test_a_copy_that_has_been_damaged_is_found_and_lent_to_nobody_anew(host: Scene, store: Path) -> None:
    user, path = host.borrowing(), host.file("net.bin")
    assert trimsfs("warm", path, "--to", f"gpu:{host.devices[1]}").returncode == 0
    verify = ("verify", "--tier", "gpu", path)
    assert trimsfs(*verify).stdout == f"{path}: 2 copies compared, no difference\n"
    host.kernel.flip(host.kernel.devices[0].allocations()[0].number, 3 * MIB)
    done = trimsfs(*verify)
    assert (done.returncode, f"its copy on {host.device} differs from the file" in done.stderr) == (17, True)
    assert "differs from the file at byte 3145728" in host.mount.log()
    assert trimsfs(*verify).stdout == f"{path}: 1 copy compared, no difference\n"
    fresh = host.borrowing()
    assert user.digest() != fresh.digest() == digest_of(store)
    assert len(host.kernel.devices[0].allocations()) == 2
    user.kill()
    wait_until(lambda: len(host.kernel.devices[0].allocations()) == 1)
