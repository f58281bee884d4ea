"""The receive loop: bytes of a body go from its socket into one buffer, and on to a sink, for stores and for a fleet.

A TLS record brings at most 16 KiB, so a gibibyte takes 65,536 reads. The loop does little for each: checksums, writes
and the check for a stall are for pieces, which gather in the buffer until it is full or a read has to wait.
"""

import time
from typing import Any, Protocol

from trimsfs.concurrency.read_moderation import WAITED_S, ReadModeration
from trimsfs.errors import TransientStoreError
from trimsfs.stores.base import Sink
from trimsfs.types import Buffer

PIECE = 1 << 18
"""Most bytes to pass on at a time: they stay in a core's cache from the socket to the checksum."""


class Body(Protocol):
    """The stream of an answer."""

    def readinto1(self, buffer: memoryview, /) -> int:
        """Fill the beginning of a buffer with what has come, or with what comes next; 0 at the end."""

    def close(self) -> None:
        """Release the connection, or close it if there are bytes left."""


class Pace(Protocol):
    """Decides whether a body comes quickly enough."""

    def check(self, done: int) -> None:
        """Raise an error if *done* bytes so far are too few."""


class HttpBody:
    """The body of *raw*, urllib3's response. Reads from the connection, past urllib3's copies."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        answer = raw._fp
        direct = not getattr(answer, "chunked", True) and answer.length is not None
        self._answer = answer if direct and "content-encoding" not in raw.headers else None

    def readinto1(self, buffer: memoryview, /) -> int:
        answer = self._answer
        if answer is None:  # in chunks, or compressed
            piece = self._raw.read1(len(buffer))
            buffer[: len(piece)] = piece
            return len(piece)
        if answer.fp is None:
            return 0
        count: int = answer.fp.readinto1(buffer[: answer.length])
        answer.length -= count
        if not answer.length:
            answer.close()  # of the answer, not of its connection
        return count

    def close(self) -> None:
        if self._answer is not None and self._answer.isclosed():
            self._raw.release_conn()
        else:
            self._raw.close()


def receive(body: Body, length: int, sink: Sink, pace: Pace, *, begin: Buffer = b"") -> None:
    """Pass the next *length* bytes on, the first of which, *begin*, are here already.

    Raises TransientStoreError if the body ends before, and what the *pace* and the *sink* raise.
    """
    buffer = memoryview(bytearray(min(PIECE, length)))
    buffer[: len(begin)] = begin
    done = filled = passed = len(begin)
    moderation = ReadModeration(length - done)
    before = time.monotonic()
    while done < length or filled:
        waited = False
        if done < length:
            count = body.readinto1(buffer[filled : filled + length - done])
            if not count:
                raise TransientStoreError(f"the body ended after {done} of {length} bytes")
            filled += count
            done += count
            now = time.monotonic()
            waited, before = now - before >= WAITED_S, now
        if waited or filled == len(buffer) or done == length:
            sink(buffer[:filled])
            pace.check(done)
            moderation.pause(done - passed, waited=waited)
            filled, passed, before = 0, done, time.monotonic()
