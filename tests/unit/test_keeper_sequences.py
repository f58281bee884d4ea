"""A keeper that hears anything, with any descriptors: it does what its protocol says, or ends the server."""

import array
import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mountctl.keeper import control_socket, descriptor_store, protocol
from mountctl.keeper.descriptor_store import HELD_LIMIT
from mountctl.keeper.keeper import Keeper
from mountctl.keeper.phase import Phase
from mountctl.keeper.server_process import ServerProcess
from mountctl.linux import mounting
from mountctl.linux.mounting import MountIdentity
from tests.support.messages import near_misses

DESCRIPTORS: dict[str, Callable[[], int]] = {
    "device": lambda: os.open("/dev/null", os.O_RDWR),
    "file": lambda: os.open(__file__, os.O_RDONLY),
    "name": lambda: os.open(__file__, os.O_PATH),
    "directory": lambda: os.open("/", os.O_RDONLY),
    "memory": lambda: os.memfd_create("test"),
    "socket": lambda: socket.socket(socket.AF_UNIX).detach(),
}
TURN = [b'{"type": "standing-by", "ledger": "2"}', b'{"type": "mount"}', b'{"type": "ready", "resends": true}']
numbers = st.sampled_from([1, 2, 3, 7, (1 << 31) - 1])
right = (
    st.sampled_from(["mount", "backing-open", "listen", "alive"]).map(lambda kind: {"type": kind})
    | st.builds(
        lambda kind, number: {"type": kind, "number": number}, st.sampled_from(["hold", "let-go", "recall"]), numbers
    )
    | numbers.map(lambda number: {"type": "backing-close", "id": number})
    | st.booleans().map(lambda resends: {"type": "ready", "resends": resends})
    | st.text(max_size=20).map(lambda text: {"type": "failed", "kind": "StoreError", "error": text})
)
messages = (
    right.map(lambda message: json.dumps(message).encode())
    | near_misses.map(lambda message: json.dumps(message).encode())
    | st.binary(min_size=1, max_size=64)
    | st.just(b"x" * 9000)
)
said = st.tuples(messages, st.lists(st.sampled_from(sorted(DESCRIPTORS)), max_size=2))


class TakenOver(ServerProcess):
    """A server whose words come from the test; it has no process."""

    def __init__(self) -> None:
        self.channel, self.end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.order: dict[str, Any] = ORDER
        self.standing_by, self.ledger_version, self.heard_at = False, "", 0.0
        self.ready_at: float | None = None
        self.unclaimed: int | None = None
        self.killed = False

    @property
    def pid(self) -> int:
        return 0

    def kill(self) -> None:
        self.killed = True

    def say(self, data: bytes, kinds: list[str]) -> None:
        descriptors = [DESCRIPTORS[kind]() for kind in kinds]
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        self.end.sendmsg([data], rights)
        for descriptor in descriptors:
            os.close(descriptor)


ORDER: dict[str, Any] = {
    "mountpoint": "/nowhere",
    "source": "test",
    "allow_other": True,
    "foreground": True,
    "server": ["false"],
    "options": {"log_file": "/dev/null", "cache_dir": "/nowhere"},
}


@contextmanager
def keeper(done: list[str]) -> Iterator[tuple[Keeper, TakenOver]]:
    """A keeper, what is done by whom it keeps, and nothing that it does to the host."""

    def mount(*_: object, **__: object) -> int:
        done.append("mount")
        return os.open("/dev/null", os.O_RDWR)

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
        made, server = Keeper(ORDER, None, {}), TakenOver()
        vars(made)["_standby"] = server
        made._selector.register(server.channel, 1)
        try:
            yield made, server
        finally:
            made._control_socket.close()
            made._descriptor_store.close()
            made._connection.close()
            made._selector.close()
            server.channel.close()
            server.end.close()


def hear(made: Keeper, server: TakenOver, data: bytes, kinds: list[str]) -> None:
    """Say something, and have the keeper act on it; answers are heard now and then only."""
    server.say(data, kinds)
    made._dispatcher.receive(server)
    if server.standing_by:
        made._promote(server)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@given(st.lists(said, max_size=25), st.booleans())
@settings(deadline=None, max_examples=100)
def test_anything_is_done_or_ends_the_server(words: list[tuple[bytes, list[str]]], has_turn: bool) -> None:
    before = descriptors()
    done: list[str] = []
    with keeper(done) as (made, server):
        for data in TURN if has_turn else []:
            hear(made, server, data, ["device"] if data == TURN[1] else [])
        assert not server.killed
        idle = descriptors()
        for data, kinds in words:
            hear(made, server, data, kinds)
            if server.killed:  # nothing more of it is heard
                break
            assert len(data) <= protocol.MESSAGE_LIMIT
            assert made._phase is not Phase.ENDING
        assert done.count("mount") <= 1
        # What is held, the connection, the lock, two listeners.
        assert descriptors() <= idle + len(made._descriptor_store._descriptors) + 4
        assert len(made._descriptor_store._descriptors) <= HELD_LIMIT
    assert descriptors() == before
