"""A connection to a member of the fleet: HTTP over TLS with certificates of the fleet's CA on both sides.

The event loop waits for the head of an answer, however long it takes; a thread reads the body.
"""

import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import h11
import trio

from trimsfs.stores.base import Sink
from trimsfs.stores.http.receive_loop import PIECE, RECORD, is_readable, receive

CONNECT_TIMEOUT_S = 0.25
"""How long a host of the same network takes to accept a connection, at most."""
HANDSHAKE_TIMEOUT_S = 3.0
"""A host that is busy may take that long to compute."""
BODY_TIMEOUT_S = 2.0
"""How long a body may pause."""
JUDGED_AFTER_S, JUDGED_AFTER_SHARE = 0.5, 1 / 8
"""How long a body comes before its rate is judged: at least so many seconds, and such a share of the patience."""
HEAD_LIMIT = 16 << 10
DETAIL_LIMIT = 200
"""Characters that are kept of what is wrong with a head: the parser quotes all of it."""


class PeerUnreachableError(Exception):
    """The member does not accept a connection, or has closed it."""


class SlowPeerError(Exception):
    """The body comes too slowly: *received* bytes of *length* in *took_s* seconds."""

    def __init__(self, received: int, length: int, took_s: float) -> None:
        super().__init__(f"{received} of {length} bytes in {took_s:.1f} s")
        self.received = received
        self.took_s = took_s


@dataclass(frozen=True, slots=True)
class Head:
    """The status and headers of an answer, whose names are in lower case, and the part of the body that came along."""

    status: int
    headers: Mapping[str, str]
    rest: bytes


def reason_of(error: OSError) -> str:
    """Why a member is not reached, in words without OpenSSL's lines of code."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"this host refuses its certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or 'closed'}"
    return "timed out" if isinstance(error, TimeoutError) else error.strerror or str(error)


class PeerConnection:
    """A connection to a member, for one request at a time. ``used`` says that it has answered before."""

    def __init__(self, connected: ssl.SSLSocket, member: str) -> None:
        self._socket = connected
        self._member = member
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT)
        self._reading = self._closed = False
        self.used = False

    @classmethod
    def open(cls, member: str, context: ssl.SSLContext) -> "PeerConnection":
        """Connect to a member, in a thread. Raises PeerUnreachableError."""
        host, _, port = member.rpartition(":")
        try:
            plain = socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S)
        except UnicodeError:
            raise PeerUnreachableError("no name of a host") from None
        except OSError as error:
            raise PeerUnreachableError(reason_of(error)) from None
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            plain.settimeout(HANDSHAKE_TIMEOUT_S)
            return cls(context.wrap_socket(plain, server_hostname=host.strip("[]")), member)
        except OSError as error:
            plain.close()
            raise PeerUnreachableError(reason_of(error)) from None

    def request(self, method: str, target: str, headers: Mapping[str, str]) -> None:
        """Send a request, which the buffer of a connection without another holds. Raises PeerUnreachableError."""
        asked = h11.Request(method=method, target=target, headers=[("host", self._member), *headers.items()])
        data = (self._parser.send(asked) or b"") + (self._parser.send(h11.EndOfMessage()) or b"")
        try:
            self._socket.settimeout(BODY_TIMEOUT_S)
            self._socket.sendall(data)
            self._socket.settimeout(0)
        except OSError as error:
            raise PeerUnreachableError(reason_of(error)) from None

    async def head(self) -> Head:
        """The head of the answer. May be cancelled and called again. Raises PeerUnreachableError."""
        try:
            while (event := self._parser.next_event()) is h11.NEED_DATA or isinstance(event, h11.InformationalResponse):
                if event is not h11.NEED_DATA:
                    await trio.lowlevel.checkpoint()
                    continue  # an interim answer (1xx)
                if not (data := await self._receive()):
                    raise PeerUnreachableError("it closed the connection")
                self._parser.receive_data(data)
        except OSError as error:
            raise PeerUnreachableError(reason_of(error)) from None
        except h11.RemoteProtocolError as error:
            raise PeerUnreachableError(str(error)[:DETAIL_LIMIT]) from None
        if not isinstance(event, h11.Response):
            raise PeerUnreachableError("connection closed")
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in event.headers}
        return Head(event.status_code, headers, bytes(self._parser.trailing_data[0]))

    async def _receive(self) -> bytes:
        while True:
            try:
                return self._socket.recv(HEAD_LIMIT)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self._socket)

    def body(self, rest: bytes, length: int, sink: Sink, patience_s: float, lags: Callable[[int], bool]) -> float:
        """Pass the *length* bytes of the body on, of which *rest* are here; the seconds that it took.

        For a thread. Raises PeerUnreachableError, and SlowPeerError if it will take longer than *patience_s* seconds or
        *lags* says so. This calls *lags* now and then with the number of bytes that are here.
        """
        pace = _PeerPace(length, patience_s, lags)
        self._reading = True
        try:
            self._socket.settimeout(BODY_TIMEOUT_S)
            receive(_PeerBody(self._socket, pace), length, sink, pace, begin=rest)
            return pace.took_s
        finally:
            self._reading = False
            if self._closed:
                self._socket.close()

    def reuse(self, head: Head) -> bool:
        """Prepare for the next request, after a whole body; whether the member keeps the connection."""
        self._parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=HEAD_LIMIT)
        self.used = True
        return "close" not in head.headers.get("connection", "").lower()

    def close(self) -> None:
        """Close it. A thread that reads from it fails, and closes the descriptor: until then, it must not be reused."""
        self._closed = True
        with suppress(OSError):  # the member has closed it
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # SSLSocket's own would have it read ciphertext
        if not self._reading:
            self._socket.close()


class _PeerPace:
    """Ends a body that will take longer than *patience_s* seconds, or *lags*. ``done`` counts its bytes so far."""

    def __init__(self, length: int, patience_s: float, lags: Callable[[int], bool]) -> None:
        self._length = length
        self._patience_s = patience_s
        self._lags = lags
        self._judged_after_s = max(JUDGED_AFTER_S, patience_s * JUDGED_AFTER_SHARE)
        self._began = time.monotonic()
        self.done = 0

    @property
    def took_s(self) -> float:
        return time.monotonic() - self._began

    def check(self, done: int) -> None:
        """Raises SlowPeerError."""
        self.done, took_s = done, self.took_s
        judged = min(self._length, -(-done // PIECE) * PIECE)  # a piece that has begun counts as a whole one
        late = took_s > self._judged_after_s and took_s * self._length > self._patience_s * judged
        if done < self._length and (self._lags(done) or late):
            raise SlowPeerError(done, self._length, took_s)


class _PeerBody:
    """The rest of a body, from a member's socket."""

    def __init__(self, connected: ssl.SSLSocket, pace: _PeerPace) -> None:
        self._socket = connected
        self._pace = pace
        self.most = RECORD

    def readinto1(self, buffer: memoryview, /) -> int:
        """Raises PeerUnreachableError."""
        try:
            count = self._socket.recv_into(buffer)
        except OSError as error:
            raise PeerUnreachableError(f"after {self._pace.done} bytes: {reason_of(error)}") from None
        if count == 0:
            raise PeerUnreachableError(f"closed after {self._pace.done} bytes")
        return count

    def ready(self) -> bool:
        return is_readable(self._socket)

    def close(self) -> None:
        """Leave the connection open: `PeerConnection` decides."""
