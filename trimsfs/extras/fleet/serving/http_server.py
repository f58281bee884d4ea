"""Answers nginx's requests over a Unix socket. Answers have headers only: nginx sends the bytes."""

import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

import h11
import trio

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 2048
"""As many requests may wait for the store at once. More wait in nginx, which gives them up after a while."""
HEADERS_LIMIT = 16 << 10
READ_SIZE = 16 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request; its body is not read. Names of headers are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A status and headers."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)


class HttpServer:
    """Answers each request by *answer*, which is cancelled when the client hangs up."""

    def __init__(self, answer: Callable[[Request], Awaitable[Answer]]) -> None:
        self._answer = answer

    async def run(self, listener: socket.socket) -> None:
        """Serve connections until cancelled."""
        free = trio.Semaphore(MOST_CONNECTIONS)
        with trio.socket.from_stdlib_socket(listener) as accepting:
            async with trio.open_nursery() as nursery:
                while True:
                    await free.acquire()
                    try:
                        connection, _ = await accepting.accept()
                    except OSError as error:
                        free.release()
                        log.error("fleet: no connection accepted: %s: retrying in 1 s", error)
                        await trio.sleep(1)
                        continue
                    nursery.start_soon(self._serve, trio.SocketStream(connection), free)

    async def _serve(self, stream: trio.SocketStream, free: trio.Semaphore) -> None:
        protocol = h11.Connection(h11.SERVER, max_incomplete_event_size=HEADERS_LIMIT)
        try:
            async with stream:
                while (request := await _next_request(protocol, stream)) is not None:
                    answer = await self._while_connected(request, stream)
                    if answer is None:
                        break
                    await stream.send_all(_bytes_of(protocol, answer))
                    if protocol.our_state is not h11.DONE or protocol.their_state is not h11.DONE:
                        break
                    protocol.start_next_cycle()
        except (h11.ProtocolError, trio.BrokenResourceError):
            pass  # it has gone, or is no nginx
        finally:
            free.release()

    async def _while_connected(self, request: Request, stream: trio.SocketStream) -> Answer | None:
        """The answer to a request; None if the client hangs up before."""
        answer: Answer | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_at_end, stream.socket, nursery.cancel_scope)
            try:
                answer = await self._answer(request)
            except Exception:  # a defect: it ends this request, not the server
                log.exception("fleet: request failed: internal error")
                answer = Answer(status=500)
            nursery.cancel_scope.cancel()
        return answer


async def _next_request(protocol: h11.Connection, stream: trio.SocketStream) -> Request | None:
    """The next request of a connection; None at its end."""
    request: Request | None = None
    while True:
        event = protocol.next_event()
        if event is h11.NEED_DATA:
            protocol.receive_data(await stream.receive_some(READ_SIZE))
        elif isinstance(event, h11.Request):
            headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
            request = Request(method=event.method.decode("ascii"), target=event.target.decode("ascii"), headers=headers)
        elif isinstance(event, h11.EndOfMessage):
            return request
        elif not isinstance(event, h11.Data):
            return None


async def _cancel_at_end(connection: trio.socket.SocketType, scope: trio.CancelScope) -> None:
    """Cancel a scope when the other side closes its connection."""
    await trio.lowlevel.wait_readable(connection)
    try:
        gone = await connection.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        gone = True  # it has not read an earlier answer
    if gone:
        scope.cancel()


def _bytes_of(protocol: h11.Connection, answer: Answer) -> bytes:
    headers = [*answer.headers.items(), ("content-length", "0")]
    head = protocol.send(h11.Response(status_code=answer.status, headers=headers)) or b""
    return head + (protocol.send(h11.EndOfMessage()) or b"")
