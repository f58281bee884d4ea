"""The receive loop: bytes of a body go from its socket into one buffer, and on to a sink, for stores and for a fleet.

A TLS record brings at most 16 KiB, so a gibibyte takes 65,536 reads. The loop does little for each. Checksums, writes
and the check for a stall are for pieces. These gather in the buffer until it is full or a read has to wait.
"""

import http.client
import io
import select
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from trimsfs.concurrency.read_moderation import WAITED_S, ReadModeration
from trimsfs.errors import TransientStoreError
from trimsfs.stores.base import Sink
from trimsfs.types import Buffer

PIECE = 1 << 18
"""Most bytes to pass on at a time: they stay in a core's cache from the socket to the checksum."""
GATHERED_S = 0.002
"""A piece that has gathered for so long is passed on before a read that would have to wait."""
SLOW_S, CAREFUL_BYTES = 0.01, 1 << 20
"""A read that waits so long tells of a slow link: none of the next bytes waits for those after it. Nor do the first."""
RECORD = 1 << 14
"""Most bytes in a record of TLS, and in a read of one."""


class Body(Protocol):
    """The stream of an answer. A read that returns fewer than ``most`` bytes, if as many fit, has returned all that had
    come."""

    @property
    def most(self) -> int: ...

    def readinto1(self, buffer: memoryview, /) -> int:
        """Fill the beginning of a buffer with what has come, or with what comes next; 0 at the end."""

    def ready(self) -> bool:
        """Whether the next read most likely need not wait."""

    def close(self) -> None:
        """Release the connection, or close it if there are bytes left."""


class Pace(Protocol):
    """Decides whether a body comes quickly enough."""

    def check(self, done: int) -> None:
        """Raise an error if *done* bytes so far are too few."""


@runtime_checkable
class RoomySink(Protocol):
    """A sink that has room for the next bytes itself: they need not be copied."""

    def room(self) -> memoryview:
        """Where the next bytes go, at least one."""

    def filled(self, count: int, *, waits: bool = False) -> None:
        """Take the first *count* bytes of the room. The next ones may take long if the stream *waits*."""


class HttpBody:
    """The body of *raw*, urllib3's response. Reads from the connection, past urllib3's copies.

    Calls *cut_off* if it is closed before its end.
    """

    def __init__(self, raw: Any, *, cut_off: Callable[[], None] = lambda: None) -> None:
        self._raw = raw
        self._cut_off = cut_off
        answer = getattr(raw, "_fp", None)
        plain = not getattr(answer, "chunked", True) and "content-encoding" not in raw.headers
        self._answer: http.client.HTTPResponse | None = answer if plain else None
        self._connected: socket.socket | None = None

    def readinto1(self, buffer: memoryview, /) -> int:
        answer = self._answer
        if answer is None or answer.length is None:  # in chunks, compressed, or until the connection ends
            piece = self._raw.read1(len(buffer))
            buffer[: len(piece)] = piece
            return len(piece)
        if answer.fp is None:
            return 0
        if self._connected is None:  # what came with the headers is in a buffer, which is empty then
            count: int = answer.fp.readinto1(buffer[: min(answer.length, io.DEFAULT_BUFFER_SIZE)])
            if len(buffer) >= io.DEFAULT_BUFFER_SIZE and self._raw.connection is not None:
                self._connected = self._raw.connection.sock
        else:
            count = self._connected.recv_into(buffer[: answer.length])
        answer.length -= count
        if not answer.length:
            answer.close()  # of the answer, not of its connection
        return count

    @property
    def most(self) -> int:
        return RECORD if isinstance(self._connected, ssl.SSLSocket) else PIECE

    def ready(self) -> bool:
        return self._connected is None or is_readable(self._connected)

    def close(self) -> None:
        if self._answer is not None and self._answer.isclosed():
            self._raw.release_conn()
        else:
            self._raw.close()
            self._cut_off()


class _Pieces:
    """Room for a sink that takes pieces."""

    def __init__(self, sink: Sink, size: int) -> None:
        self._sink = sink
        self._buffer = memoryview(bytearray(size))

    def room(self) -> memoryview:
        return self._buffer

    def filled(self, count: int, *, waits: bool = False) -> None:
        del waits
        self._sink(self._buffer[:count])


def is_readable(connected: socket.socket) -> bool:
    """Whether bytes have come on a connection."""
    if isinstance(connected, ssl.SSLSocket) and connected.pending():
        return True
    poll = select.poll()
    poll.register(connected, select.POLLIN)
    return bool(poll.poll(0))


def receive(body: Body, length: int, sink: Sink | RoomySink, pace: Pace, *, begin: Buffer = b"") -> None:
    """Pass the next *length* bytes on, the first of which, *begin*, are here already.

    Raises TransientStoreError if the body ends before, and what the *pace* and the *sink* raise.
    """
    into = sink if isinstance(sink, RoomySink) else _Pieces(sink, min(PIECE, length))
    done = 0
    while done < len(begin):
        room = into.room()
        count = min(len(room), len(begin) - done)
        room[:count] = begin[done : done + count]
        into.filled(count)
        done += count
    moderation = ReadModeration(length - done)
    careful = CAREFUL_BYTES
    while done < length:
        room, filled, waited = into.room()[: min(PIECE, length - done)], 0, False
        began = before = time.monotonic()
        count = asked = 0
        while filled < len(room) and not waited:
            # Not asked for each record of TLS on a fast link: it would cost as much as the read.
            drained = careful > 0 or 0 < count < min(asked, body.most) or before - began > GATHERED_S
            if filled and drained and not body.ready():
                waited = True
                break
            asked = len(room) - filled
            count = body.readinto1(room[filled:])
            if not count:
                raise TransientStoreError(f"the body ended after {done + filled} of {length} bytes")
            filled += count
            now = time.monotonic()
            careful = CAREFUL_BYTES if now - before >= SLOW_S else careful - count
            waited, before = now - before >= WAITED_S, now
        into.filled(filled, waits=waited)
        done += filled
        pace.check(done)
        moderation.pause(filled, waited=waited)
