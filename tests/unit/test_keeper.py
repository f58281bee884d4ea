"""What a keeper believes of its servers, its operator and its service manager."""

import errno
import json
import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import example, given

from mountctl.keeper import control_socket
from mountctl.keeper.control_socket import ControlSocket, KeeperGoneError, KeeperSilentError, ask
from mountctl.keeper.servers import server_messages
from mountctl.keeper.servers.server_process import ServerProcess
from mountctl.linux.sd_notify import Notifier, stored_descriptors
from tests.support.keeper_in_process import keeper_in_process
from tests.support.messages import near_misses


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"type": "standing-by", "ledger": "1"}', server_messages.StandingBy("1")),
        (b'{"type": "mount"}', server_messages.Mount()),
        (b'{"type": "backing-open"}', server_messages.BackingOpen()),
        (b'{"type": "backing-open", "count": 32}', server_messages.BackingOpen(32)),
        (b'{"type": "backing-close", "id": 7}', server_messages.BackingClose(7)),
        (b'{"type": "hold", "number": 1}', server_messages.Hold(1)),
        (b'{"type": "let-go", "number": 2147483647}', server_messages.LetGo(2147483647)),
        (b'{"type": "recall", "number": 3}', server_messages.Recall(3)),
        (b'{"type": "listen"}', server_messages.Listen()),
        (b'{"type": "ready", "resends": true}', server_messages.Ready(True)),
        (b'{"type": "alive"}', server_messages.Alive()),
        (b'{"type": "failed", "kind": "StoreError", "error": "no"}', server_messages.Failed("StoreError", "no")),
    ],
)
def test_messages_of_servers(data: bytes, message: server_messages.Message) -> None:
    assert server_messages.parse(data) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 8000,
        b'"mount"',
        b'{"type": "umount"}',
        b'{"type": "standing-by"}',
        b'{"type": "standing-by", "ledger": "../x"}',
        b'{"type": "mount", "mountpoint": "/etc"}',
        b'{"type": "backing-open", "count": 0}',
        b'{"type": "backing-open", "count": 33}',
        b'{"type": "backing-open", "count": true}',
        b'{"type": "backing-close"}',
        b'{"type": "backing-close", "id": 0}',
        b'{"type": "backing-close", "id": -1}',
        b'{"type": "backing-close", "id": true}',
        b'{"type": "backing-close", "id": 1e3}',
        b'{"type": "backing-close", "id": 2147483648}',
        b'{"type": "hold"}',
        b'{"type": "hold", "number": 0}',
        b'{"type": "hold", "number": 2147483648}',
        b'{"type": "hold", "number": 1, "id": 1}',
        b'{"type": "hold", "number": "1"}',
        b'{"type": "let-go", "number": -1}',
        b'{"type": "let-go", "number": true}',
        b'{"type": "recall", "number": 1.0}',
        b'{"type": "recall", "id": 1}',
        b'{"type": "listen", "path": "/run/x"}',
        b'{"type": "ready", "resends": 1}',
        b'{"type": "failed", "kind": "../x", "error": ""}',
        b'{"type": "failed", "kind": "A", "error": 5}',
        b"\xff\xfe",
    ],
)
def test_what_no_server_says_is_refused(data: bytes) -> None:
    with pytest.raises(server_messages.ProtocolError):
        server_messages.parse(data)


@given(near_misses)
@example({"type": "failed", "kind": "A", "error": "\x1b]0;title\x07\nsecond line"})
def test_what_is_nearly_a_message_holds_only_what_it_may(fields: dict[str, Any]) -> None:
    try:
        message = server_messages.parse(json.dumps(fields).encode())
    except server_messages.ProtocolError:
        return
    assert "more" not in fields
    match message:
        case server_messages.BackingOpen(count):
            assert count is None or 0 < count <= server_messages.BACKING_LIMIT
        case (
            server_messages.BackingClose(number)
            | server_messages.Hold(number)
            | server_messages.LetGo(number)
            | server_messages.Recall(number)
        ):
            assert 0 < number < 1 << 31
        case server_messages.Failed(kind, error):
            assert kind.isalpha()
            assert error.isprintable()
            assert len(error) <= 4096


# The operator's socket


@dataclass
class Listening:
    """A control socket at a path, which answers with what it got."""

    end: ControlSocket
    selector: selectors.BaseSelector
    path: Path

    def serve(self, rounds: int = 4) -> None:
        for _ in range(rounds):
            for key, _ in self.selector.select(0.05):
                key.data()

    def connected(self) -> socket.socket:
        end = socket.socket(socket.AF_UNIX)
        end.settimeout(2)
        end.connect(str(self.path))
        return end


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listening]:
    path, selector = tmp_path / "run/keeper.sock", selectors.DefaultSelector()
    monkeypatch.setattr(control_socket, "socket_path", lambda *_: path)

    def handle(request: dict[str, Any], reply: control_socket.Reply) -> None:
        reply({"got": request})

    end = ControlSocket(selector, handle)
    assert end.listen(Path("/models")) is None
    yield Listening(end, selector, path)
    end.close()
    assert not path.exists()
    selector.close()


def test_only_the_owner_may_speak_to_a_keeper(listening: Listening) -> None:
    assert listening.path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (b'{"do": "status"}\n', {"got": {"do": "status"}}),
        (b"[]\n", {"error": "not a JSON object"}),
        (b"nonsense\n", {"error": "not a JSON object"}),
        (b"[" * 20000 + b"\n", {"error": "not a JSON object"}),
        (b"x" * 70000, None),
        (b"", None),
    ],
)
def test_requests_of_an_operator(text: bytes, answer: object, listening: Listening) -> None:
    with listening.connected() as end:
        for start in range(0, len(text), 16384):
            end.sendall(text[start : start + 16384])
            listening.serve(1)
        if not text:
            end.shutdown(socket.SHUT_WR)
        listening.serve()
        received = end.recv(1 << 16)
        assert (json.loads(received) if received else None) == answer


def test_who_connects_and_says_nothing_is_let_go(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    with listening.connected() as end:
        listening.serve()
        monkeypatch.setattr(control_socket, "REQUEST_TIMEOUT_S", -1)
        listening.end.drop_idle()
        assert end.recv(1) == b""


def test_a_keeper_that_hangs_is_known_however_many_have_asked_it(listening: Listening) -> None:
    with ExitStack() as stack:
        for _ in range(20):
            end = stack.enter_context(socket.socket(socket.AF_UNIX))
            end.settimeout(0.01)
            with suppress(OSError):
                end.connect(str(listening.path))
        with pytest.raises(KeeperSilentError, match="does not answer: run `mountctl recover /models`"):
            ask(Path("/models"), {"do": "status"}, timeout_s=0.5)


def no_room(*_: object, **__: object) -> NoReturn:
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


def test_a_keeper_that_cannot_watch_a_connection_closes_it(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening.connected() as end:
        monkeypatch.setattr(listening.selector, "register", no_room)
        listening.serve(1)
        assert end.recv(1) == b""
    monkeypatch.setattr(control_socket, "REQUEST_TIMEOUT_S", -1)
    listening.end.drop_idle()


def test_a_server_is_not_taken_for_ended_by_a_keeper_without_room(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            server = ServerProcess.__new__(ServerProcess)
            server._process = process
            assert not server.ended()
            with monkeypatch.context() as patch:
                patch.setattr(Path, "read_text", no_room)
                assert not server.ended()
        finally:
            process.kill()
    assert server.ended()


def test_a_keeper_that_ends_late_leaves_the_next_ones_socket_alone(listening: Listening) -> None:
    other = ControlSocket(listening.selector, lambda request, reply: None)
    assert other.listen(Path("/models")) is None
    listening.end.close()
    assert listening.path.exists()
    other.close()
    assert not listening.path.exists()


def test_a_keeper_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(KeeperGoneError, match="is gone"):
        ask(tmp_path / "nowhere", {"do": "status"}, timeout_s=1)


@pytest.mark.parametrize("broken", ["import", "removal"])
def test_a_keeper_whose_programs_have_been_replaced_tells_the_outcome_first(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    if broken == "import":
        monkeypatch.setitem(sys.modules, "mountctl.linux.cdi_specs", None)
    else:
        monkeypatch.setattr("mountctl.linux.cdi_specs.trimsfs_at", lambda: None)  # takes no mount point
    with keeper_in_process([]) as (keeper, _):
        monkeypatch.setattr(keeper._reporter, "outcome", lambda message, text: told.append(message["type"]))
        monkeypatch.setattr(keeper._reporter, "warning", told.append)
        keeper._clean_up()
    outcome, warning = told
    assert outcome == "failed"
    assert warning.startswith("the CDI devices of /nowhere are not removed: ")


# systemd


def test_what_the_service_manager_is_told(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(2)
        notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000", "WATCHDOG_PID": str(os.getpid())})
        notifier.tell("READY=1", "STATUS=serving")
        assert manager.recv(4096) == b"READY=1\nSTATUS=serving"
        notifier.alive()
        notifier.alive()  # not due yet
        notifier.unstore(("fuse",))
        assert [manager.recv(4096) for _ in range(2)] == [b"WATCHDOG=1", b"FDSTOREREMOVE=1\nFDNAME=fuse"]
        read, write = os.pipe()
        notifier.store({"fuse": write})
        text, descriptors, _, _ = socket.recv_fds(manager, 4096, 4)
        assert text == b"FDSTORE=1\nFDNAME=fuse"
        os.write(descriptors[0], b"the same pipe")
        assert os.read(read, 64) == b"the same pipe"
        for descriptor in (read, write, *descriptors):
            os.close(descriptor)


@pytest.mark.parametrize("address", [{}, {"NOTIFY_SOCKET": "/nonexistent/socket"}], ids=["none", "gone"])
def test_without_a_service_manager_a_keeper_goes_on(address: dict[str, str]) -> None:
    notifier = Notifier(address | {"WATCHDOG_USEC": "1"})
    notifier.tell("READY=1")
    notifier.alive()


def test_descriptors_of_another_process_are_not_taken() -> None:
    assert stored_descriptors({"LISTEN_PID": "1", "LISTEN_FDS": "2", "LISTEN_FDNAMES": "fuse:lock"}) == {}
    assert stored_descriptors({}) == {}
