"""Programs in sandboxes use copies by path, as far as they have the path and the socket."""

import errno
import hashlib
import random
from pathlib import Path

import pytest

from tests.gpu.scene import MIB, Program, Scene, scene
from tests.support.mounts import wait_until

SIZE = 3 * MIB
CONTENT = random.Random(9).randbytes(SIZE)
DIGEST = hashlib.sha256(CONTENT).hexdigest()
SANDBOXES = {
    "mounts": ["bwrap", "--die-with-parent", "--bind", "/", "/", "--dev-bind", "/dev", "/dev"],
    "processes": ["bwrap", "--die-with-parent", "--bind", "/", "/", "--unshare-pid", "--proc", "/proc"],
    "users": [
        "bwrap",
        "--die-with-parent",
        "--bind",
        "/",
        "/",
        "--unshare-user",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
    ],
}


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    (store / "net.bin").write_bytes(CONTENT)
    return store


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_a_sandboxed_program_shares_the_copy_of_the_host(store: Path, tmp_path: Path, sandbox: str) -> None:
    with scene(store, tmp_path) as host:
        outside = host.borrowing("net.bin")
        inside = host.program(sandbox=SANDBOXES[sandbox])
        told = inside.ask("control_file", path=host.control_file("net.bin"))

        assert "error" not in told, told
        assert outside.digest() == inside.digest() == DIGEST
        assert len(host.kernel.devices[0].allocations()) == 1
        assert {lease["uid"] for copy in host.copies() for lease in copy["leases"]} == {0}
        host.kill_server()
        assert inside.digest() == DIGEST
        assert inside.ask("again")["nbytes"] == SIZE
        inside.kill()
        wait_until(lambda: host.leases() == 1)


def test_a_sandbox_without_the_socket_is_told_so(store: Path, tmp_path: Path) -> None:
    hidden = [*SANDBOXES["mounts"], "--tmpfs", "/run/trimsfs"]
    with scene(store, tmp_path) as host:
        inside = host.program(sandbox=hidden)
        told = inside.ask("control_file", path=host.control_file("net.bin"), use=False)
        assert told["socket"] == host.mount.control()["gpu"]["socket"]
        given = {"device": host.device, "address": told["socket"], "token": told["token"], "nbytes": SIZE}
        assert inside.ask("socket", **given)["errno"] == errno.ENOENT
        assert _by_handle(host, hidden).digest() == DIGEST


def _by_handle(host: Scene, sandbox: list[str]) -> Program:
    program = host.program(sandbox=sandbox)
    program.ask("control_file", path=host.control_file("net.bin", f"{host.device}.ipc"))
    return program
