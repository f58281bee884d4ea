"""Devices and drivers that fail, or are not there: clear errors, and a file system that goes on."""

import errno
import os
import random
from pathlib import Path

import pytest

from tests.cuda import environment
from tests.gpu.scene import MIB, Scene, scene
from tests.support.mounts import mounted, trimsfs, wait_until
from trimsfs.options import GPU_OFF

SIZE = 5 * MIB
CONTENT = random.Random(6).randbytes(SIZE)
NOWHERE = "GPU-00000000-0000-0000-0000-000000000000"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    (store / "net.bin").write_bytes(CONTENT)
    (store / "other.bin").write_bytes(CONTENT[::-1])
    return store


def refused(host: Scene, name: str = "net.bin", asked: str | None = None) -> int:
    """The error of asking for a copy."""
    return int(host.program().ask("control_file", path=host.control_file(name, asked))["errno"])


def test_a_device_that_is_lost_is_told_and_the_others_go_on(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        descriptor = os.open(host.control_file("net.bin"), os.O_RDONLY)
        host.kernel.devices[0].lose()

        assert refused(host, "other.bin") == errno.EIO
        assert refused(host) == errno.EIO
        with pytest.raises(OSError, match="Stale file handle"):
            os.pread(descriptor, 1 << 16, 0)
        os.close(descriptor)
        assert "mountctl restart" in host.mount.control()["gpu"]["devices"][0]["failure"]
        assert host.mount.control()["gpu"]["devices"][0]["used_bytes"] == 0
        assert host.file("net.bin").read_bytes() == CONTENT
        second = host.kernel.devices[1].uuid
        assert host.borrowing("net.bin", second).ask("digest")["digest"]
        assert host.mount.log().count("has failed") == 1
        host.kernel.devices[0].restore()
        host.kill_server()
        wait_until(lambda: len(host.mount.control()["gpu"]["devices"]) == 2)
        assert host.borrowing("net.bin").ask("digest")["digest"]


def test_a_device_that_is_lost_while_it_is_filled_fails_whoever_waits(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program = host.program()
        with host.kernel.devices[0].paused():
            program.tell("control_file", path=host.control_file("net.bin"))
            wait_until(lambda: [copy["state"] for copy in host.copies()] == ["loading"])
            host.kernel.devices[0].lose()
        assert program.answer()["errno"] == errno.EIO
        assert host.file("net.bin").read_bytes() == CONTENT


def test_a_device_that_there_is_not(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        assert refused(host, asked=NOWHERE) == errno.ENOENT
        assert refused(host, asked="GPU-0") == errno.ENOENT
        assert refused(host, asked=f"{host.device}@layer.*") == errno.ENOENT  # no tensors are known in it
        ioctl = host.program().ask("ioctl", path=str(host.file("net.bin")), device=NOWHERE, memory=0)
        assert ioctl["errno"] == errno.ENOENT
        assert (
            host.program().ask("ioctl", path=str(host.file("net.bin")), device=host.device, memory=7)["errno"]
            == errno.EINVAL
        )


def test_a_driver_without_a_device(store: Path, tmp_path: Path) -> None:
    with mounted(store, tmp_path / "mount", environment=environment(None)) as mount:
        wait_until(lambda: mount.control()["gpu"]["unavailable"] is not None)
        assert "CUDA_ERROR_NO_DEVICE" in mount.control()["gpu"]["unavailable"]
        with pytest.raises(FileNotFoundError):
            os.open(mount.path / ".trims/net.bin/gpu" / NOWHERE, os.O_RDONLY)
        assert (mount.path / "net.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("options", [(), ("gpu=off",)])
def test_no_driver(store: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    with mounted(store, tmp_path / "mount", *options) as mount:
        assert (GPU_OFF if options else "libcuda.so.1") in mount.control()["gpu"]["unavailable"]
        with pytest.raises(FileNotFoundError):
            os.open(mount.path / ".trims/net.bin/gpu" / NOWHERE, os.O_RDONLY)
        assert (mount.path / "net.bin").read_bytes() == CONTENT
        assert "gpu" not in os.listdir(mount.path / ".trims/net.bin")


def test_a_copy_that_has_been_damaged_is_found_and_lent_to_nobody_anew(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        user = host.borrowing("net.bin")
        text = (host.mount.path / ".trims/net.bin/verify-gpu").read_text()
        assert '"state": "done"' in text
        host.kernel.flip(host.kernel.devices[0].allocations()[0].number, 3 * MIB)
        text = (host.mount.path / ".trims/net.bin/verify-gpu").read_text()
        assert '"kind": "CopyDamagedError"' in text
        assert "differs from the file at byte 3145728" in host.mount.log()
        damaged, fresh = user.digest(), host.borrowing("net.bin").digest()
        assert damaged != fresh
        assert len(host.kernel.devices[0].allocations()) == 2
        user.kill()
        wait_until(lambda: len(host.kernel.devices[0].allocations()) == 1)
        assert trimsfs("evict", host.file("other.bin")).returncode == 0


def test_an_empty_file_has_a_copy(store: Path, tmp_path: Path) -> None:
    (store / "empty.bin").touch()
    with scene(store, tmp_path) as host:
        assert host.borrowing("empty.bin").ask("again")["nbytes"] == 0


def test_a_copy_outlives_the_file_that_it_was_made_of(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, "--metadata-ttl", "0.1") as host:
        before = host.borrowing("net.bin")
        digest = before.digest()
        (store / "net.bin").write_bytes(CONTENT[1:])
        wait_until(lambda: host.file("net.bin").stat().st_size == SIZE - 1)
        wait_until(lambda: host.borrowing("net.bin").ask("again")["nbytes"] == SIZE - 1)
        assert before.digest() == digest
        assert len(host.copies()) == 2
