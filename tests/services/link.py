"""A long link to a server: a proxy that delays what clients send and paces what they get, in a process of its own.

It emulates a distance, as the fast endpoint does by itself. Bytes go from socket to socket by splice(2): the proxy
takes little of the processor time that is measured beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from . import HOST, S3Server, started

PACE_S = 0.005
"""Time between two pieces of what is paced."""
PIECE = 1 << 20


@contextlib.contextmanager
def start_link(server: S3Server, *, latency_ms: float, rate: int, shared: bool = False) -> Iterator[S3Server]:
    """The same server over a link until the context ends.

    What a client sends arrives *latency_ms* later, so that each answer does; each connection brings *rate* bytes a
    second back, or all together if it is *shared*. Raises as `started`.
    """
    url = urlsplit(server.endpoint_url)
    arguments = [f"--target={url.port}", f"--latency-ms={latency_ms}", f"--rate={rate}"]
    arguments += ["--shared"] if shared else []
    command = [sys.executable, "-m", __name__, *arguments]
    with started("link", lambda ports: [*command, f"--port={ports[0]}"]) as (ports, daemon):
        pids = (*server.pids, daemon.process.pid)
        yield dataclasses.replace(server, endpoint_url=f"{url.scheme}://{HOST}:{ports[0]}", pids=pids)


class Pace:
    """When bytes may go on, at a rate: what was not used of it while nothing came is lost."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._free = 0.0
        self._lock = threading.Lock()

    def turn(self, count: int) -> float:
        """When so many bytes may go, by the monotonic clock; they take the time after it."""
        with self._lock:
            turn = max(self._free, time.monotonic())
            self._free = turn + count / self._rate
        return turn


def _requests(client: socket.socket, server: socket.socket, latency_s: float) -> None:
    """Pass on what the client sends, late."""
    with contextlib.suppress(OSError):
        while piece := client.recv(PIECE):
            time.sleep(latency_s)
            server.sendall(piece)
    _end(server)


def _answers(server: socket.socket, client: socket.socket, pace: Pace, most: int) -> None:
    """Pass on what the server sends, in pieces of *most* bytes."""
    out, into = os.pipe()
    try:
        with contextlib.suppress(OSError):
            while count := os.splice(server.fileno(), into, most):
                time.sleep(max(0, pace.turn(count) - time.monotonic()))
                while count:
                    count -= os.splice(out, client.fileno(), count)
    finally:
        os.close(out)
        os.close(into)
        _end(client)


def _end(other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_WR)


def _serve(client: socket.socket, options: argparse.Namespace, pace: Pace) -> None:
    with client, socket.create_connection((HOST, options.target)) as server:
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        most = max(1, int(options.rate * PACE_S))
        answers = threading.Thread(target=_answers, args=(server, client, pace, most), daemon=True)
        answers.start()
        _requests(client, server, options.latency_ms / 1000)
        answers.join()


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--target", type=int, required=True)
    parser.add_argument("--latency-ms", type=float, required=True)
    parser.add_argument("--rate", type=int, required=True, help="bytes a second for each connection")
    parser.add_argument("--shared", action="store_true", help="for all connections together")
    options = parser.parse_args()
    shared = Pace(options.rate)
    with socket.create_server((HOST, options.port), backlog=512) as listener:
        while True:
            client, _ = listener.accept()
            pace = shared if options.shared else Pace(options.rate)
            threading.Thread(target=_serve, args=(client, options, pace), daemon=True).start()


if __name__ == "__main__":
    main()
