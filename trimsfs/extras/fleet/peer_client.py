"""The asking side of a fleet in a fetch process: gets chunks from other members."""

import ssl
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.extras.fleet.connection import Head, PeerConnection, PeerUnreachableError, SlowPeerError
from trimsfs.extras.fleet.pace import Pace
from trimsfs.extras.fleet.protocol import (
    CACHED_ONLY,
    CRCS,
    HOLDERS,
    RETRY_AFTER,
    ProtocolError,
    parse_crcs,
    parse_holders,
)
from trimsfs.fetch.peers import Outcome, PeerAnswer, PeerRequest
from trimsfs.stores.base import Sink

CHECKED_AFTER_S = 1.0
"""How long a member may be silent before it must show that it is alive: it may wait for the store."""
ALIVE_TIMEOUT_S = 4.0
LONGEST_WAIT_S = 60.0
"""After this time a member that is alive counts as busy."""
MOST_IDLE = 16
"""Most unused connections to a member."""
HEARD_S = 30.0
"""For how long after an answer a member is tried twice: a link that is full loses packets."""
OPEN_TIMEOUT_S = 5.0
MOST_IDLE_IN_ALL = 64
"""Most unused connections to all members: a process has few descriptors."""
IDLE_S = 30.0
"""How long an unused connection is kept; members close theirs later."""
_OUTCOMES: dict[int, Outcome] = {
    200: "ok",
    206: "ok",
    403: "refused",
    404: "absent",
    409: "other",
    421: "self",
    502: "unreachable",
}
"""What answers mean, by status; any other is that of a busy member."""
_DETAILS = {
    403: "it refuses this host's certificate",
    404: "it cannot give them: see its log, and whether its option fleet is the same",
    409: "its store has another generation of the file",
    502: "its nginx runs, but no trimsfs server behind it",
}


@dataclass(slots=True)
class _Idle:
    connection: PeerConnection
    since: float


class PeerClient:
    """Makes requests to members of the fleet, over connections that it keeps. *threads* read bodies at once."""

    def __init__(self, context: ssl.SSLContext, *, threads: int) -> None:
        self._context = context
        self._limiter = trio.CapacityLimiter(threads)
        self._connecting = trio.CapacityLimiter(threads)
        self._idle = defaultdict[str, list[_Idle]](list)
        self._heard: dict[str, float] = {}
        self._silent: dict[str, float] = {}
        self._pace = Pace()
        self._checking = defaultdict[str, trio.Lock](trio.Lock)

    async def read(self, request: PeerRequest, length: int, begin: Callable[[Sequence[int]], Sink]) -> PeerAnswer:
        """Make a request for *length* bytes, which the sink gets that *begin* makes of the checksums of the chunks.

        Raises what the sink does.
        """
        asked = await self._asked(request)
        if isinstance(asked, PeerAnswer):
            return asked
        connection, head, waited_s = asked
        kept = False
        try:
            if head.status == 200:
                return PeerAnswer(outcome="damaged", detail="it answers with more than was asked for")
            if head.status != 206:
                kept = int(head.headers.get("content-length", "1")) == len(head.rest)
                return replace(_answer_of(head), waited_s=waited_s)
            crcs = parse_crcs(head.headers.get(CRCS, ""))
            if head.headers.get("content-length") != str(length) or len(head.rest) > length:
                raise ProtocolError("another range than asked for")
            body_s = await self._body(connection, head, length, begin(crcs), request)
            kept = True
            return PeerAnswer(outcome="ok", waited_s=waited_s, body_s=body_s, received=length)
        except ValueError as error:
            return PeerAnswer(outcome="damaged", detail=str(error))
        except SlowPeerError as error:
            return PeerAnswer(
                outcome="slow",
                detail=str(error),
                waited_s=waited_s,
                body_s=error.took_s,
                received=error.received,
            )
        except PeerUnreachableError as error:
            return PeerAnswer(outcome="silent", detail=str(error), waited_s=waited_s)
        finally:
            self._return(connection, head, request.member, kept=kept)

    async def ask(self, request: PeerRequest) -> PeerAnswer:
        """Make a request for no bytes."""
        asked = await self._asked(request)
        if isinstance(asked, PeerAnswer):
            return asked
        connection, head, waited_s = asked
        self._return(connection, head, request.member, kept=True)
        return replace(_answer_of(head), waited_s=waited_s)

    async def _asked(self, request: PeerRequest) -> tuple[PeerConnection, Head, float] | PeerAnswer:
        """The connection, the head of the answer to a request, and the seconds until it came; or why none has come."""
        method, wait, began = "GET" if request.sends else "HEAD", partial(self._head, request), time.monotonic()
        try:
            connection, head = await self._answered(request.member, method, request.target, request.headers, wait)
        except PeerUnreachableError as error:
            return PeerAnswer(outcome="unreachable", detail=str(error))
        except _GivenUpError as error:
            return PeerAnswer(outcome=error.outcome, detail=f"no answer in {time.monotonic() - began:.0f} s")
        return connection, head, time.monotonic() - began

    async def _answered(
        self,
        member: str,
        method: str,
        target: str,
        headers: Mapping[str, str],
        wait: Callable[[PeerConnection], Awaitable[Head]],
    ) -> tuple[PeerConnection, Head]:
        """Make a request and *wait* for the head of its answer. Raises PeerUnreachableError, and what *wait* does."""
        while True:
            connection = await self._connected(member)
            try:
                connection.request(method, target, headers)
                head = await wait(connection)
            except PeerUnreachableError:
                connection.close()
                if connection.used:
                    continue  # the member has closed an idle connection
                raise
            except BaseException:
                connection.close()
                raise
            return connection, head

    async def _connected(self, member: str) -> PeerConnection:
        idle = self._idle[member]
        while idle:
            last = idle.pop()
            if last.since > time.monotonic() - IDLE_S:
                return last.connection
            last.connection.close()
        try:
            return await self._opened(member)
        except PeerUnreachableError:
            if self._heard.get(member, 0.0) < time.monotonic() - HEARD_S:
                raise
        return await self._opened(member)

    async def _opened(self, member: str) -> PeerConnection:
        with trio.move_on_after(OPEN_TIMEOUT_S):  # its name may take long to be looked up
            return await in_thread(
                PeerConnection.open, member, self._context, limiter=self._connecting, abandon_on_cancel=True
            )
        raise PeerUnreachableError("timed out")

    async def _head(self, request: PeerRequest, connection: PeerConnection) -> Head:
        """The head of an answer, for as long as the member shows that it is alive. Raises as `_asked`."""
        deadline = time.monotonic() + LONGEST_WAIT_S
        while time.monotonic() < deadline:
            with trio.move_on_after(CHECKED_AFTER_S):
                head = await connection.head()
                self._heard[request.member] = time.monotonic()
                return head
            if not await self._alive(request):
                raise _GivenUpError("silent")
        raise _GivenUpError("busy")

    async def _alive(self, request: PeerRequest) -> bool:
        """Whether a member answers at all."""
        member = request.member
        async with self._checking[member]:
            if self._heard.get(member, 0.0) > time.monotonic() - CHECKED_AFTER_S:
                return True
            if self._silent.get(member, 0.0) > time.monotonic() - CHECKED_AFTER_S:
                return False
            with trio.move_on_after(ALIVE_TIMEOUT_S), suppress(PeerUnreachableError):
                headers = {**request.headers, "cache-control": CACHED_ONLY}
                connection, head = await self._answered(member, "HEAD", request.target, headers, PeerConnection.head)
                self._heard[member] = time.monotonic()
                self._return(connection, head, member, kept=True)
                return True
            self._silent[member] = time.monotonic()
        return False

    async def _body(
        self, connection: PeerConnection, head: Head, length: int, sink: Sink, request: PeerRequest
    ) -> float:
        def read() -> float:
            with self._pace.body(request.member, length) as body:

                def lags(received: int) -> bool:
                    body.received = received
                    return request.lag is not None and self._pace.lags(body, request.lag)

                return connection.body(head.rest, length, sink, request.patience_s, lags)

        took_s = await in_thread(read, limiter=self._limiter, abandon_on_cancel=True)
        self._heard[request.member] = time.monotonic()
        return took_s

    def _return(self, connection: PeerConnection, head: Head, member: str, *, kept: bool) -> None:
        """Keep a connection whose answer has been read, else close it."""
        idle = self._idle[member]
        if kept and len(idle) < MOST_IDLE and connection.reuse(head):
            idle.append(_Idle(connection, time.monotonic()))
            self._close_oldest()
        else:
            connection.close()

    def _close_oldest(self) -> None:
        """Close the unused connections that have been for too long, or are too many."""
        now = time.monotonic()
        first = {member: idle[0].since for member, idle in self._idle.items() if idle}
        count = sum(map(len, self._idle.values()))
        while first:
            member = min(first, key=first.__getitem__)
            if count <= MOST_IDLE_IN_ALL and first[member] > now - IDLE_S:
                return
            idle = self._idle[member]
            idle.pop(0).connection.close()
            count -= 1
            if idle:
                first[member] = idle[0].since
            else:
                del first[member], self._idle[member]


class _GivenUpError(Exception):
    """The member does not show that it is alive, or is busy for too long."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


def _answer_of(head: Head) -> PeerAnswer:
    """What the status of an answer means."""
    holders = parse_holders(head.headers.get(HOLDERS, ""))
    outcome = _OUTCOMES.get(head.status, "away" if RETRY_AFTER in head.headers else "busy")
    detail = _DETAILS.get(head.status, "drained, or off" if outcome == "away" else f"status {head.status}")
    return PeerAnswer(outcome=outcome, detail=detail, holders=holders)
