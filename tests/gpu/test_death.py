"""What becomes of copies when the server dies, or is replaced."""

import errno
import hashlib
import json
import os
import random
from pathlib import Path

import pytest

from tests.gpu.scene import MIB, Scene, scene
from tests.support.mounts import MOUNTCTL, trimsfs, wait_until

SIZE = 5 * MIB + 999
CONTENT = random.Random(5).randbytes(SIZE)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    (store / "net.bin").write_bytes(CONTENT)
    return store


def settled(host: Scene) -> None:
    """Wait until the server that goes on has taken up what the one before has left."""
    wait_until(lambda: all(copy["state"] == "loaded" for copy in host.copies()))


def test_mapped_copies_outlive_the_server_and_are_gone_on_with(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        programs = [host.borrowing("net.bin") for _ in range(2)]
        programs.append(host.program())
        programs[-1].ask("ioctl", path=str(host.file("net.bin")), device=host.device, memory=0)
        loaded = host.kernel.devices[0].bytes_to_device
        for _ in range(2):
            host.kill_server()
            assert {program.digest() for program in programs} == {DIGEST}
            settled(host)
            assert [copy["leased"] for copy in host.copies()] == [3]
            assert {lease["uid"] for copy in host.copies() for lease in copy["leases"]} == {0}

        again = programs[0].ask("again")
        late = host.program()
        given = {"device": host.device, "address": again["socket"], "token": again["token"], "nbytes": SIZE}
        assert late.ask("socket", **given)["size"] == again["size"]
        programs += [late, host.borrowing("net.bin")]
        assert {program.digest() for program in programs} == {DIGEST}
        assert host.kernel.devices[0].bytes_to_device == loaded
        assert len(host.kernel.devices[0].allocations()) == 1
        for program in programs:
            program.kill()
        wait_until(lambda: host.leases() == 0)
        assert trimsfs("evict", host.file("net.bin")).returncode == 0
        wait_until(lambda: host.kernel.devices[0].used == 0)


def test_a_lease_that_ends_while_no_server_runs_has_ended(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        staying, leaving = host.borrowing("net.bin"), host.borrowing("net.bin")
        host.kill_server()
        leaving.kill()
        settled(host)
        wait_until(lambda: host.leases() == 1)
        staying.kill()
        wait_until(lambda: host.leases() == 0)


def test_memory_that_is_opened_by_handle_goes_with_the_server_and_the_lease_tells(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program = host.borrowing("net.bin", f"{host.device}.ipc")
        assert program.digest() == DIGEST
        host.kill_server()
        wait_until(lambda: host.kernel.devices[0].used == 0)

        assert program.ask("digest")["name"] == "CUDA_ERROR_ILLEGAL_ADDRESS"
        assert program.ask("again")["errno"] == errno.ESTALE
        assert host.borrowing("net.bin", f"{host.device}.ipc").digest() == DIGEST


def test_a_copy_that_was_being_loaded_is_loaded_by_the_next_server(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program = host.program()
        with host.kernel.devices[0].paused():
            program.tell("control_file", path=host.control_file("net.bin"))
            wait_until(lambda: [copy["state"] for copy in host.copies()] == ["loading"])
            host.kill_server()

        assert program.answer()["nbytes"] == SIZE
        assert program.digest() == DIGEST
        assert host.leases() == 1
        wait_until(lambda: len(host.kernel.devices[0].allocations()) == 1)


def test_an_upgrade_keeps_copies_and_can_change_what_is_allowed(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program = host.borrowing("net.bin")
        server = host.mount.control()["server_pid"]
        done = os.spawnl(os.P_WAIT, MOUNTCTL, MOUNTCTL, "restart", str(host.mount.path))
        assert done == 0
        assert host.mount.control()["server_pid"] != server
        settled(host)
        assert host.leases() == 1
        assert program.digest() == DIGEST


def test_a_restart_where_the_device_is_gone_drops_what_was_there(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        descriptor = os.open(host.control_file("net.bin"), os.O_RDONLY)
        assert json.loads(os.pread(descriptor, 1 << 16, 0))["nbytes"] == SIZE
        host.kernel.devices[0].lose()
        host.kill_server()
        wait_until(lambda: len(host.mount.control()["gpu"]["devices"]) == 1)

        with pytest.raises(OSError, match="Stale file handle"):
            os.pread(descriptor, 1 << 16, 0)
        os.close(descriptor)
        assert host.file("net.bin").read_bytes() == CONTENT
