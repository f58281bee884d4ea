"""What becomes of copies when the server dies, or is replaced."""

import errno
import os
from pathlib import Path

import pytest

from tests.gpu.scene import SIZE, Scene, digest_of
from tests.support.mounts import MOUNTCTL, trimsfs, wait_until


def settled(host: Scene) -> None:
    """Wait until the server that goes on has taken up what the one before has left."""
    wait_until(lambda: all(copy["state"] == "loaded" for copy in host.copies()))


def test_mapped_copies_outlive_the_server_and_are_gone_on_with(host: Scene, store: Path) -> None:
    programs = [host.borrowing() for _ in range(2)]
    programs.append(host.program())
    programs[-1].ask("ioctl", path=str(host.file("net.bin")), device=host.device, memory=0)
    loaded = host.kernel.devices[0].bytes_to_device
    for _ in range(2):
        host.kill_server()
        assert {program.digest() for program in programs} == {digest_of(store)}
        settled(host)
        assert [copy["leased"] for copy in host.copies()] == [3]
        assert {lease["uid"] for copy in host.copies() for lease in copy["leases"]} == {0}

    again = programs[0].ask("again")
    late = host.program()
    given = {"device": host.device, "address": again["socket"], "token": again["token"], "nbytes": SIZE}
    assert late.ask("socket", **given)["size"] == again["size"]
    programs += [late, host.borrowing()]
    assert {program.digest() for program in programs} == {digest_of(store)}
    assert host.kernel.devices[0].bytes_to_device == loaded
    assert len(host.kernel.devices[0].allocations()) == 1
    for program in programs:
        program.kill()
    wait_until(lambda: host.leases() == 0)
    assert trimsfs("evict", host.file("net.bin")).returncode == 0
    wait_until(lambda: host.kernel.devices[0].used == 0)


def test_a_lease_that_ends_while_no_server_runs_has_ended(host: Scene) -> None:
    staying, leaving = host.borrowing(), host.borrowing()
    host.kill_server()
    leaving.kill()
    settled(host)
    wait_until(lambda: host.leases() == 1)
    staying.kill()
    wait_until(lambda: host.leases() == 0)


@pytest.mark.parametrize("host", [("gpu_sharing=none",), ("eviction=gpu=eager",)], indirect=True)
def test_what_ends_while_no_server_runs_is_given_up_by_the_next(host: Scene) -> None:
    programs = [host.borrowing() for _ in range(2)]
    host.kill_server()
    for program in programs:
        program.kill()
    wait_until(lambda: host.copies() == [] and host.kernel.devices[0].used == 0, 20)


def test_memory_that_is_opened_by_handle_goes_with_the_server_and_the_lease_tells(host: Scene, store: Path) -> None:
    program = host.borrowing("net.bin", f"{host.device}.ipc")
    assert program.digest() == digest_of(store)
    host.kill_server()
    wait_until(lambda: host.kernel.devices[0].used == 0)

    assert program.ask("digest")["name"] == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert program.ask("again")["errno"] == errno.ESTALE
    assert host.borrowing("net.bin", f"{host.device}.ipc").digest() == digest_of(store)


def test_a_copy_that_was_being_loaded_is_loaded_by_the_next_server(host: Scene, store: Path) -> None:
    program = host.program()
    with host.kernel.devices[0].paused():
        program.tell("control_file", path=host.control_file())
        host.wait_until_loading()
        host.kill_server()

    assert program.answer()["nbytes"] == SIZE
    assert program.digest() == digest_of(store)
    assert host.leases() == 1
    wait_until(lambda: len(host.kernel.devices[0].allocations()) == 1)


def test_a_restart_keeps_copies(host: Scene, store: Path) -> None:
    program, server = host.borrowing(), host.server
    assert os.spawnl(os.P_WAIT, MOUNTCTL, MOUNTCTL, "restart", str(host.mount.path)) == 0
    assert host.server != server
    settled(host)
    assert host.leases() == 1
    assert program.digest() == digest_of(store)


def test_a_restart_where_the_device_is_gone_drops_what_was_there(host: Scene, store: Path) -> None:
    program = host.borrowing()
    host.kernel.devices[0].lose()
    host.kill_server()
    wait_until(lambda: len(host.mount.control()["gpu"]["devices"]) == 1)

    assert program.ask("again")["errno"] == errno.ESTALE
    assert host.file("net.bin").read_bytes() == (store / "net.bin").read_bytes()
