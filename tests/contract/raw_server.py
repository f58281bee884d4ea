"""An HTTP server that answers whatever a test wants, also what no HTTP server should."""

import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import trio

Answer = Callable[[trio.SocketStream], Awaitable[None]]
"""What to do on a connection once a request has come; the connection is closed afterwards."""


@dataclass(slots=True)
class RawServer:
    """``requests`` holds the head of each request so far."""

    endpoint_url: str
    answers: list[Answer]
    requests: list[bytes] = field(default_factory=list)
    _arrivals: trio.Event = field(default_factory=trio.Event)

    async def arrived(self, count: int) -> None:
        """Wait until so many requests have come in all."""
        while len(self.requests) < count:
            await self._arrivals.wait()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection."""
        request = b""
        while b"\r\n\r\n" not in request:
            received = await stream.receive_some()
            if not received:
                return
            request += received
        self.requests.append(request)
        arrivals, self._arrivals = self._arrivals, trio.Event()
        arrivals.set()
        # The last answer goes on for ever.
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        with suppress(trio.BrokenResourceError):  # the client has hung up
            await answer(stream)


@asynccontextmanager
async def raw_server(*answers: Answer) -> AsyncIterator[RawServer]:
    """A server that gives one answer after the other, the last one again and again."""
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        server = RawServer(f"http://127.0.0.1:{listener.socket.getsockname()[1]}", list(answers))
        nursery.start_soon(partial(trio.serve_listeners, server.serve, [listener]))
        try:
            yield server
        finally:
            nursery.cancel_scope.cancel()


def respond(
    status: str, body: bytes = b"", *, length: int | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    """A whole response; *length* is what it says of its body."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return raw("\r\n".join([*lines, "", ""]).encode() + body)


def then(first: Answer, *others: Answer) -> Answer:
    """One after the other."""

    async def answer(stream: trio.SocketStream) -> None:
        for part in (first, *others):
            await part(stream)

    return answer


async def stall(_stream: trio.SocketStream) -> None:
    """Send nothing more, but stay connected."""
    await trio.sleep_forever()


async def hang_up(_stream: trio.SocketStream) -> None:
    """Close the connection."""


async def reset(stream: trio.SocketStream) -> None:
    """Break the connection off, as a crash or a firewall does."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def raw(data: bytes) -> Answer:
    """Send these bytes."""

    async def answer(stream: trio.SocketStream) -> None:
        await stream.send_all(data)

    return answer


def drip(data: bytes, *, times: int, pause_s: float = 0.02) -> Answer:
    """Send these bytes again and again, slowly."""

    async def answer(stream: trio.SocketStream) -> None:
        for _ in range(times):
            await stream.send_all(data)
            await trio.sleep(pause_s)

    return answer
