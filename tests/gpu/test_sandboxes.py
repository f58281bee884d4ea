"""Programs in sandboxes use copies by path, as far as they have the path and the socket."""

import errno
from pathlib import Path

import pytest

from tests.gpu.scene import SIZE, Scene, digest_of
from tests.support.mounts import wait_until

BWRAP = ["bwrap", "--die-with-parent", "--bind", "/", "/"]
SANDBOXES = {
    "processes": [*BWRAP, "--unshare-pid", "--proc", "/proc"],
    "users": [*BWRAP, "--unshare-user", "--unshare-pid", "--unshare-net", "--unshare-ipc"],
}


@pytest.mark.parametrize("sandbox", SANDBOXES)
def test_a_sandboxed_program_shares_the_copy_of_the_host(host: Scene, store: Path, sandbox: str) -> None:
    outside, inside = host.borrowing(), host.program(sandbox=SANDBOXES[sandbox])
    told = inside.ask("control_file", path=host.control_file())

    assert "error" not in told, told
    assert outside.digest() == inside.digest() == digest_of(store)
    assert len(host.kernel.devices[0].allocations()) == 1
    assert {lease["uid"] for copy in host.copies() for lease in copy["leases"]} == {0}
    host.kill_server()
    assert inside.digest() == digest_of(store)
    assert inside.ask("again")["nbytes"] == SIZE
    inside.kill()
    wait_until(lambda: host.leases() == 1)


def test_a_sandbox_without_the_socket_is_told_so(host: Scene, store: Path) -> None:
    inside = host.program(sandbox=[*BWRAP, "--dev-bind", "/dev", "/dev", "--tmpfs", "/run/trimsfs"])
    told = inside.ask("control_file", path=host.control_file(), use=False)
    assert told["socket"] == host.mount.control()["gpu"]["socket"]
    given = {"device": host.device, "address": told["socket"], "token": told["token"], "nbytes": SIZE}
    assert inside.ask("socket", **given)["errno"] == errno.ENOENT
    inside.ask("control_file", path=host.control_file("net.bin", f"{host.device}.ipc"))
    assert inside.digest() == digest_of(store)
