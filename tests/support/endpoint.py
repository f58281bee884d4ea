"""A server of HTTP/1.1 over real sockets, with TLS or without, whose answers a test writes byte by byte."""

import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

import urllib3

from tests.support.certificates import Authority

HOST = "127.0.0.1"
HEAD_LIMIT = 1 << 16

Answer = Callable[[socket.socket], None]
"""Writes the answer to a request to its connection. A ConnectionError ends the connection."""


class Endpoint:
    """Gives an *answer* to each request; ``connections`` counts those that clients have made."""

    def __init__(self, answer: Answer, *, authority: Authority | None = None) -> None:
        self.connections = 0
        self._answer = answer
        self._authority = authority
        self._tls = None if authority is None else _server_context(authority)

    @contextmanager
    def running(self, *, timeout_s: float = 10.0) -> Iterator[urllib3.HTTPConnectionPool]:
        """Serve for the length of the block; a client's pool of one connection, whose reads time out."""
        with socket.create_server((HOST, 0)) as listener:
            threads: list[threading.Thread] = []

            def accept() -> None:
                with suppress(OSError):  # the listener is closed
                    while True:
                        client, _ = listener.accept()
                        self.connections += 1
                        threads.append(threading.Thread(target=self._serve, args=(client,)))
                        threads[-1].start()

            accepting = threading.Thread(target=accept)
            accepting.start()
            try:
                with self._pool(listener.getsockname()[1], timeout_s) as pool:
                    yield pool
            finally:
                listener.shutdown(socket.SHUT_RDWR)
                accepting.join()
                for thread in threads:
                    thread.join(10)
                    assert not thread.is_alive(), "a connection is still open"

    def _pool(self, port: int, timeout_s: float) -> urllib3.HTTPConnectionPool:
        if self._authority is None:
            return urllib3.HTTPConnectionPool(HOST, port, maxsize=1, timeout=timeout_s, retries=False)
        authority = str(self._authority.certificate)
        return urllib3.HTTPSConnectionPool(HOST, port, maxsize=1, timeout=timeout_s, retries=False, ca_certs=authority)

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            with client:
                while _request_came(client):
                    self._answer(client)


def _server_context(authority: Authority) -> ssl.SSLContext:
    own = authority.identity(HOST)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(own.certificate, own.key)
    return context


def _request_came(client: socket.socket) -> bool:
    head = b""
    while b"\r\n\r\n" not in head:
        piece = client.recv(HEAD_LIMIT)
        if not piece:
            return False
        head += piece
    return True


def head(headers: Mapping[str, str | int]) -> bytes:
    """The head of an answer of status 200."""
    lines = ["HTTP/1.1 200 OK", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def whole(content: bytes) -> Answer:
    """An answer that is as it should be."""
    return lambda client: client.sendall(head({"Content-Length": len(content)}) + content)


def truncated(content: bytes, *, length: int) -> Answer:
    """An answer of so many bytes whose connection ends after the *content*."""

    def answer(client: socket.socket) -> None:
        client.sendall(head({"Content-Length": length}) + content)
        raise ConnectionError

    return answer


def reset(content: bytes, *, length: int, read: threading.Event) -> Answer:
    """An answer whose connection is reset once the client has *read* its *content*."""

    def answer(client: socket.socket) -> None:
        client.sendall(head({"Content-Length": length}) + content)
        read.wait(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise ConnectionError

    return answer
