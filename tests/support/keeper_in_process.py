"""A keeper in the process of a test: its servers are the test's, and it does nothing to the host."""

import array
import os
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mountctl.keeper import control_socket, descriptor_store
from mountctl.keeper.keeper import Keeper
from mountctl.keeper.servers.server_process import ServerProcess
from mountctl.keeper.servers.server_source import OwnServers
from mountctl.linux import mounting
from mountctl.linux.mounting import MountIdentity

DESCRIPTORS: dict[str, Callable[[], int]] = {
    "device": lambda: os.open("/dev/null", os.O_RDWR),
    "file": lambda: os.open(__file__, os.O_RDONLY),
    "name": lambda: os.open(__file__, os.O_PATH),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "memory": lambda: os.memfd_create("test"),
    "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
}


ORDER: dict[str, Any] = {
    "mountpoint": "/nowhere",
    "source": "test",
    "allow_other": True,
    "foreground": True,
    "server": ["false"],
    "options": {"log_file": "/dev/null", "cache_dir": "/nowhere"},
}


class FakeServer(ServerProcess):
    """A server whose messages come from the test; it has no process."""

    def __init__(self, order: dict[str, Any] = ORDER, *, spare: bool = False, alone: bool = False) -> None:
        self.channel, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._begin(order, self.channel)
        self.spare, self.alone = spare, alone
        self.kills = self.hurries = 0
        self.ended_with: int | None = None

    @property
    def pid(self) -> int:
        return 0

    def hurry(self) -> None:
        self.hurries += 1

    def kill(self) -> None:
        self.kills += 1

    def terminate(self) -> None:
        self.ended_with = 0

    def ended(self) -> bool:
        return self.ended_with is not None

    def reaped(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> bool:
        return True

    @property
    def exit_code(self) -> int:
        assert self.ended_with is not None
        return self.ended_with

    def end_reason(self) -> str:
        return f"exit code {self.ended_with}"

    def say(self, data: bytes, kinds: Iterable[str] = ()) -> None:
        """Send a message, with descriptors of these kinds."""
        descriptors = [DESCRIPTORS[kind]() for kind in kinds]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.end.sendmsg([data], rights)
        for descriptor in descriptors:
            os.close(descriptor)


@contextmanager
def keeper_in_process(
    done: list[str], open_fuse: Callable[[], int] = DESCRIPTORS["device"], *, left: FakeServer | None = None
) -> Iterator[tuple[Keeper, FakeServer]]:
    """A keeper and its standby, which the keeper's loop does not know; what is done to the host goes to *done*.

    One that follows a killed keeper comes with the server that it has *left*.
    """

    def mount(*_: object, **__: object) -> int:
        done.append("mount")
        return open_fuse()

    def open_backing(_connection: int, file: int) -> int:
        assert os.readlink(f"/proc/self/fd/{file}").startswith((__file__, "/memfd:"))
        done.append("backing")
        return 7

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as directory:
        patch.setattr(mounting, "mount", mount)
        patch.setattr(mounting, "identify", lambda _: MountIdentity("0:1", 1))
        patch.setattr(mounting, "open_backing", open_backing)
        for harmless in ("close_backing", "tune", "unmount", "abort_device"):
            patch.setattr(mounting, harmless, lambda *_, **__: [])
        patch.setattr(descriptor_store, "gpu_path", lambda _: Path(directory) / "run/x.gpu")
        patch.setattr(control_socket, "socket_path", lambda _: Path(directory) / "run/x.sock")
        made = Keeper(ORDER, OwnServers(), None, {"fuse": open_fuse()} if left is not None else {}, left)
        server = left or FakeServer()
        if left is None:
            made._crew.standby = server
        made._selector.register(server.channel, 1)
        try:
            yield made, server
        finally:
            made._control_socket.close()
            made._mount.descriptor_store.close()
            made._mount.connection.close()
            made._selector.close()
            server.channel.close()
            server.end.close()
