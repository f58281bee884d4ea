"""Programs that mean harm, or are merely odd, to the GPU tier: others notice nothing."""

import contextlib
import errno
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.gpu.scene import MIB, SIZE, Scene, digest_of, scene
from tests.support.mounts import again_while_copied, trimsfs, wait_until


def connected(host: Scene) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(20)
    end.connect(host.mount.control()["gpu"]["socket"])
    return end


def test_garbage_at_the_socket_costs_nothing(host: Scene, store: Path) -> None:
    program = host.borrowing()
    before, descriptors = host.server, len(os.listdir(f"/proc/{host.server}/fd"))
    tokens = [b'{"token": "guess"}', b'{"token": 1}', b'{"token": ["a"]}', b'"token"']
    for sent in [b"[" * 60_000, b"garbage", b"\xff" * 5000, b"{", b"{}", b"[]", *tokens] * 5:
        with connected(host) as end:
            socket.send_fds(end, [sent], [0, 1, 2, 0])
            data, lent, _, _ = socket.recv_fds(end, 4096, 4)
        assert not lent, sent
        assert not data or json.loads(data)["kind"] == "NoSuchEntryError", sent

    assert program.digest() == digest_of(store)
    assert host.server == before
    wait_until(lambda: len(os.listdir(f"/proc/{before}/fd")) <= descriptors + 2)
    assert "Traceback" not in host.mount.log()


def test_odd_programs_are_served_as_others(host: Scene) -> None:
    """One whose name is no text, and one that asks an open file again and again."""
    before, program = host.server, host.program()
    program.ask("rename")
    assert "error" not in program.ask("control_file", path=host.control_file())
    program.ask("close")
    asked = {"path": str(host.file("net.bin")), "device": host.device, "count": 200}
    assert len(program.ask("again_and_again", **asked)["tokens"]) == 1
    assert (host.leases(), host.server) == (1, before)


def test_what_waits_for_a_device_is_bounded_and_leaves_files_alone(host: Scene, store: Path) -> None:
    program = host.program()
    with host.kernel.devices[0].paused():
        refused = program.ask("crowd", path=host.control_file(), count=400, room=256)["refused"]
        assert refused == {str(errno.EBUSY): 400 - 256}
        done = subprocess.run(
            ["cat", host.file("other.bin")], capture_output=True, timeout=20, check=True
        )  # not by this process, which nobody could end
        assert done.stdout == (store / "other.bin").read_bytes()
        program.kill()
    assert host.borrowing("other.bin").ask("again")["nbytes"] == SIZE


@pytest.mark.parametrize("host", [("gpu_sharing=all",)], indirect=True)
def test_connections_of_one_user_leave_room_for_others(host: Scene) -> None:
    told = host.program().ask("control_file", path=host.control_file(), use=False)
    held = [connected(host) for _ in range(300)]
    try:
        for end in held:
            with contextlib.suppress(BrokenPipeError):  # it has been refused already
                end.send(json.dumps({"token": told["token"]}).encode())
        answers = [json.loads(end.recv(4096)) for end in held]
        assert sum("size" in answer for answer in answers) == 256
        assert {answer["kind"] for answer in answers if "kind" in answer} == {"InUseError"}
        assert "error" not in host.another_user().ask("control_file", path=host.control_file())
    finally:
        for end in held:
            end.close()
    wait_until(lambda: host.leases() == 2)


def test_clients_that_are_killed_at_any_moment_leave_nothing(host: Scene) -> None:
    device = host.kernel.devices[0]
    device.slow(seconds_per_mib=0.02)
    for number in range(12):
        path = host.control_file("net.bin", host.device + (".ipc" if number % 2 else ""))
        with subprocess.Popen(["head", "-c1", path], stdout=subprocess.DEVNULL) as process:
            time.sleep(0.02 + 0.015 * number)
            process.kill()
    device.slow()
    wait_until(lambda: host.leases() == 0)
    wait_until(lambda: all(copy["state"] == "loaded" for copy in host.copies()))
    wait_until(lambda: device.used == host.counted("used_bytes") == sum(copy["bytes"] for copy in host.copies()))
    assert trimsfs("evict", host.file("net.bin")).returncode == 0
    wait_until(lambda: device.used == 0)


def test_signals_again_and_again_do_not_keep_a_copy_from_being_loaded(host: Scene) -> None:
    host.kernel.devices[0].slow(seconds_per_mib=0.3)
    program = host.program()
    program.ask("interrupt", seconds=0.2)
    assert program.ask("control_file", path=host.control_file(), use=False)["nbytes"] == SIZE
    assert host.kernel.devices[0].bytes_to_device <= 2 * SIZE


def test_a_load_that_nobody_wants_any_more_makes_way_at_once(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, memory=[12 * MIB]) as host:
        host.kernel.devices[0].slow(seconds_per_mib=0.2)
        waiting = host.program()
        waiting.tell("control_file", path=host.control_file())
        wait_until(lambda: host.kernel.devices[0].used > 0)
        waiting.kill()
        assert "error" not in host.program().ask("control_file", path=host.control_file("other.bin"))


def test_a_device_that_hangs_does_not_hold_up_unmounting(host: Scene) -> None:
    program = host.program()
    with host.kernel.devices[0].paused():
        program.tell("control_file", path=host.control_file())
        host.wait_until_loading()
        program.kill()
        begun = 0.0

        def unmounted() -> "subprocess.CompletedProcess[str]":
            nonlocal begun
            begun = time.monotonic()
            return trimsfs("umount", host.mount.path)

        done = again_while_copied(unmounted)
        assert (done.returncode, done.stderr) == (0, "")
        assert time.monotonic() - begun < 20


def test_an_eviction_that_is_refused_has_evicted_nothing(host: Scene) -> None:
    host.load("net.bin")
    with host.file("net.bin").open("rb"):
        assert trimsfs("evict", host.file("net.bin")).returncode == 12
    assert [copy["path"] for copy in host.copies()] == ["net.bin"]
