"""Programs that mean harm, or are merely odd, to the GPU tier: others notice nothing."""

import contextlib
import errno
import json
import os
import random
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.gpu.scene import MIB, Scene, scene
from tests.support.mounts import again_while_copied, trimsfs, wait_until

SIZE = 5 * MIB + 3
STRANGER = 4711


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    for name in ("net.bin", "other.bin"):
        (store / name).write_bytes(random.Random(name).randbytes(SIZE))
    return store


def server(host: Scene) -> int:
    return int(host.mount.control()["server_pid"])


def connected(host: Scene) -> socket.socket:
    end = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end.settimeout(20)
    end.connect(host.mount.control()["gpu"]["socket"])
    return end


def books_agree(host: Scene) -> bool:
    """Whether the device, the server's count and what it lists are of one mind."""
    listed = sum(copy["bytes"] for copy in host.copies())
    return bool(host.kernel.devices[0].used == host.counted("used_bytes") == listed)


def test_garbage_at_the_socket_costs_nothing(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        before, descriptors = server(host), len(os.listdir(f"/proc/{server(host)}/fd"))
        for sent in [b"[" * 60_000, b"garbage", b"\xff" * 100, b"{", b'{"token": 1}', b'"token"'] * 8:
            with connected(host) as end:
                socket.send_fds(end, [sent], [0, 1, 2, 0])
                end.recv(4096)

        assert server(host) == before
        wait_until(lambda: len(os.listdir(f"/proc/{before}/fd")) <= descriptors + 2)
        assert "Traceback" not in host.mount.log()


def test_a_process_may_have_a_name_that_is_no_text(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        before, program = server(host), host.program()
        program.ask("rename")
        assert "error" not in program.ask("control_file", path=host.control_file("net.bin"))
        program.ask("close")
        assert "error" not in program.ask("ioctl", path=str(host.file("net.bin")), device=host.device, memory=0)
        assert server(host) == before


def test_what_waits_for_a_device_is_bounded_and_leaves_files_alone(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program = host.program()
        with host.kernel.devices[0].paused():
            refused = program.ask("crowd", path=host.control_file("net.bin"), count=400, room=256)["refused"]
            assert refused == {str(errno.EBUSY): 400 - 256}
            done = subprocess.run(
                ["cat", host.file("other.bin")], capture_output=True, timeout=20, check=True
            )  # not by this process, which nobody could end
            assert done.stdout == (store / "other.bin").read_bytes()
            program.kill()
        assert host.borrowing("other.bin").ask("again")["nbytes"] == SIZE


def test_connections_of_one_user_leave_room_for_others(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, "gpu_sharing=all") as host:
        told = host.program().ask("control_file", path=host.control_file("net.bin"), use=False)
        held = [connected(host) for _ in range(300)]
        try:
            for end in held:
                with contextlib.suppress(BrokenPipeError):  # it has been refused already
                    end.send(json.dumps({"token": told["token"]}).encode())
            answers = [json.loads(end.recv(4096)) for end in held]
            assert sum("size" in answer for answer in answers) == 256
            assert {answer["kind"] for answer in answers if "kind" in answer} == {"InUseError"}
            stranger = host.program()
            stranger.ask("become", uid=STRANGER)
            assert "error" not in stranger.ask("control_file", path=host.control_file("net.bin"))
        finally:
            for end in held:
                end.close()
        wait_until(lambda: host.leases() == 2)


def test_one_open_file_has_one_lease_however_often_it_asks(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program = host.program()
        asked = {"path": str(host.file("net.bin")), "device": host.device, "count": 200}
        assert len(program.ask("again_and_again", **asked)["tokens"]) == 1
        assert host.leases() == 1


@pytest.mark.parametrize("kind", ["", ".ipc"])
def test_clients_that_are_killed_at_any_moment_leave_nothing(store: Path, tmp_path: Path, kind: str) -> None:
    with scene(store, tmp_path) as host:
        host.kernel.devices[0].slow(seconds_per_mib=0.02)
        path = host.control_file("net.bin", host.device + kind)
        for number in range(12):
            with subprocess.Popen(["head", "-c1", path], stdout=subprocess.DEVNULL) as process:
                time.sleep(0.02 + 0.015 * number)
                process.kill()
        host.kernel.devices[0].slow()
        wait_until(lambda: host.leases() == 0)
        wait_until(lambda: all(copy["state"] == "loaded" for copy in host.copies()) and books_agree(host))
        assert trimsfs("evict", host.file("net.bin")).returncode == 0
        wait_until(lambda: host.kernel.devices[0].used == 0)


def test_signals_again_and_again_do_not_keep_a_copy_from_being_loaded(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        host.kernel.devices[0].slow(seconds_per_mib=0.3)
        program = host.program()
        program.ask("interrupt", seconds=0.2)
        assert program.ask("control_file", path=host.control_file("net.bin"), use=False)["nbytes"] == SIZE
        assert host.kernel.devices[0].bytes_to_device <= 2 * SIZE


def test_a_load_that_nobody_wants_any_more_makes_way_at_once(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path, memory=[12 * MIB]) as host:
        host.kernel.devices[0].slow(seconds_per_mib=0.2)
        waiting = host.program()
        waiting.tell("control_file", path=host.control_file("net.bin"))
        wait_until(lambda: host.kernel.devices[0].used > 0)
        waiting.kill()
        assert "error" not in host.program().ask("control_file", path=host.control_file("other.bin"))


def test_a_device_that_hangs_does_not_hold_up_unmounting(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        program = host.program()
        with host.kernel.devices[0].paused():
            program.tell("control_file", path=host.control_file("net.bin"))
            wait_until(lambda: [copy["state"] for copy in host.copies()] == ["loading"])
            program.kill()
            begun = 0.0

            def unmounted() -> "subprocess.CompletedProcess[str]":
                nonlocal begun
                begun = time.monotonic()
                return trimsfs("umount", host.mount.path)

            done = again_while_copied(unmounted)
            assert (done.returncode, done.stderr) == (0, "")
            assert time.monotonic() - begun < 20


@pytest.mark.parametrize("option", [("gpu_sharing=none",), ("eviction=gpu=eager",)])
def test_what_ends_while_no_server_runs_is_given_up_by_the_next(
    store: Path, tmp_path: Path, option: tuple[str, str]
) -> None:
    with scene(store, tmp_path, *option) as host:
        programs = [host.borrowing("net.bin") for _ in range(2)]
        host.kill_server()
        for program in programs:
            program.kill()
        wait_until(lambda: host.copies() == [] and host.kernel.devices[0].used == 0, 20)


def test_nothing_of_before_is_behind_the_last_tensor(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        for kind in ("", ".ipc"):
            told = host.program().ask("control_file", path=host.control_file("net.bin", host.device + kind), use=False)
            number = host.kernel.devices[0].allocations()[-1].number
            assert not any(host.kernel.read(number, SIZE, told["size"] - SIZE))


def test_an_eviction_that_is_refused_has_evicted_nothing(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        os.close(os.open(host.control_file("net.bin"), os.O_RDONLY))
        with host.file("net.bin").open("rb"):
            assert trimsfs("evict", host.file("net.bin")).returncode == 12
        assert [copy["path"] for copy in host.copies()] == ["net.bin"]


def test_others_are_not_told_of_copies_that_they_cannot_have(store: Path, tmp_path: Path) -> None:
    with scene(store, tmp_path) as host:
        host.borrowing("net.bin")
        done = subprocess.run(
            ["cat", host.mount.path / ".trims/gpu"], user=STRANGER, capture_output=True, timeout=20, check=True
        )
        assert [device["copies"] for device in json.loads(done.stdout)["devices"]] == [[], []]
