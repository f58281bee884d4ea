"""Descriptors by a server's socket: what is received, and what programs are told when nothing is."""

import gc
import os
import socket
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.gpu.mount import TIMEOUT_S, error_of
from tests.support.users import STRANGER, as_user
from trimsfs.extras.gpu.client import descriptor_client, mapped_copy
from trimsfs.extras.gpu.client.copy_leases import CopyDescription

DESCRIPTION: dict[str, Any] = {
    "device": "GPU-0",
    "generation": "1",
    "memory": "vmm",
    "size": 4096,
    "nbytes": 512,
    "format": None,
    "tensors": (),
    "token": "00",
}


class Answering:
    """A server that answers each connection with one message, and with descriptors."""

    def __init__(self, path: Path, answer: bytes, descriptors: int = 0) -> None:
        self.path = path
        self.asked: list[bytes] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._answer = answer
        self._descriptors = descriptors
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "Answering":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(TIMEOUT_S)
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with connection, open("/dev/null", "rb") as file:
            self.asked.append(connection.recv(1 << 16))
            if self._answer:
                socket.send_fds(connection, [self._answer], [file.fileno()] * self._descriptors)


def open_files() -> int:
    gc.collect()  # what other tests have left is not counted
    return len(os.listdir("/proc/self/fd"))


def test_a_descriptor_is_received_and_no_other_kept(tmp_path: Path) -> None:
    before = open_files()
    with Answering(tmp_path / "socket", b'{"size": 4096}', 2) as server:
        descriptor, size = descriptor_client.receive(str(server.path), "00ff")
    assert (size, os.get_inheritable(descriptor.number), server.asked) == (4096, False, [b'{"token": "00ff"}'])
    descriptor.close()
    assert open_files() == before


@pytest.mark.parametrize(
    ("answer", "descriptors", "message"),
    [
        (b'{"error": "no", "kind": "NotPermittedError"}', 1, "socket: no"),
        (b'{"size": 4096}', 0, "invalid answer"),
        (b"{", 1, "invalid answer"),
        (b"[]", 1, "invalid answer"),
        (b"{}", 2, "invalid answer"),
    ],
)
def test_an_answer_that_gives_no_memory(tmp_path: Path, answer: bytes, descriptors: int, message: str) -> None:
    before = open_files()
    with Answering(tmp_path / "socket", answer, descriptors) as server:
        assert message in error_of(lambda: descriptor_client.receive(str(server.path), "00"))
    assert open_files() == before


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'{"error": "no such token", "kind": "NoSuchEntryError"}', "socket: no such token"),
        (b"", "the server closed the connection"),
    ],
)
def test_what_a_server_that_has_just_begun_answers(tmp_path: Path, answer: bytes, message: str) -> None:
    with Answering(tmp_path / "socket", answer) as server:
        assert message in error_of(
            lambda: descriptor_client.receive(str(server.path), "00"), descriptor_client.NotYetError
        )
    assert "has no socket" in error_of(lambda: descriptor_client.receive("", "00"), descriptor_client.NotYetError)


def test_memory_of_another_size_than_was_told_is_not_mapped(tmp_path: Path) -> None:
    before = open_files()
    with Answering(tmp_path / "socket", b'{"size": 8192}', 1) as server:
        told = CopyDescription(**DESCRIPTION, socket=str(server.path))
        assert "8192 bytes instead of 4096" in error_of(lambda: mapped_copy._mapped(told, 0))
    assert open_files() == before


def test_a_socket_that_is_not_there_or_that_nobody_listens_at(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    assert "No such file or directory: mount the socket into the container" in error_of(
        lambda: descriptor_client.receive(str(path), "00")
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
    assert "Connection refused" in error_of(lambda: descriptor_client.receive(str(path), "00"))


def test_a_server_that_does_not_answer_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(descriptor_client, "TIMEOUT_S", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(0)
        for _ in range(3):  # the kernel takes some connections by itself
            assert "no answer within" in error_of(lambda: descriptor_client.receive(str(tmp_path / "socket"), "00"))


def test_a_server_that_has_just_begun_is_asked_again_only_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_copy, "PATIENCE_S", 0.1)
    lease: Any = SimpleNamespace(description=lambda: CopyDescription(**DESCRIPTION, socket=""))
    assert "has no socket" in error_of(lambda: mapped_copy._mapped_soon(lease, 0))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_user_who_may_not_ask() -> None:
    with tempfile.TemporaryDirectory() as directory, Answering(Path(directory, "socket"), b"") as server:
        os.chmod(directory, 0o755)
        server.path.chmod(0o600)
        told = as_user(STRANGER, lambda: error_of(lambda: descriptor_client.receive(str(server.path), "00")))
        assert "Permission denied: this user may not use" in told
        assert "closed the connection" in error_of(
            lambda: descriptor_client.receive(str(server.path), "00"), descriptor_client.NotYetError
        )
