"""Uploads: which member gets a chunk from this host, when, and who has got it and can pass it on.

nginx sends the bytes, and reports each end over a datagram socket.
"""

import itertools
import re
import secrets
import socket
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import dataclass, field

import trio

MOST_OF_CHUNK = 4
"""Uploads of one chunk at once. A chunk that hundreds of hosts want first spreads from host to host."""
MANY = 8
"""With so many uploads under way, this host leaves an upload to another member that can make it."""
REFERRALS = MOST_OF_CHUNK
"""To how many members this host names one that has got a chunk."""
PATIENCE_S = 5.0
"""How long an upload may wait for its turn. After that, this host answers that it is busy."""
LONGEST_S = 30.0
"""After this time an upload counts no longer, whether nginx has reported its end or not. The kernel drops reports while
ten wait for a busy server. To take a slow upload for one that has ended only lets one more begin."""
KNOWN_CHUNKS = 4096
"""Chunks of which this host remembers who has got them."""
_REPORT = re.compile(rb"<\d+>.*? trimsfs: (?P<number>\d{1,15}) (?P<sent>\d{1,15}) (?P<complete>OK)?")
_REPORT_SIZE = 1024

Chunk = tuple[str, int]
"""A blob's token and the number of a chunk."""


class BusyError(Exception):
    """This host sends too much already. ``holders`` are members that have the chunk."""

    def __init__(self, holders: list[str]) -> None:
        super().__init__("busy")
        self.holders = holders


@dataclass(slots=True)
class _Spreading:
    """A chunk that is being sent: to how many, who can be named in place of this host, and who waits."""

    active: int = 0
    holders: deque[str] = field(default_factory=deque)
    waiting: deque[trio.Event] = field(default_factory=deque)

    async def changed(self, deadline: float) -> bool:
        """Wait until it is this one's turn to look again; False at the deadline."""
        event, woken = trio.Event(), False
        self.waiting.append(event)
        try:
            with trio.move_on_at(deadline):
                await event.wait()
                woken = True
        finally:
            if not woken and event.is_set():
                self.wake(1)  # the next one in place of this one
            elif not woken:
                self.waiting.remove(event)
        return woken

    def wake(self, count: int) -> None:
        """Have some of those who wait look again."""
        while self.waiting and count:
            self.waiting.popleft().set()
            count -= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Upload:
    chunk: Chunk
    asker: str
    size: int
    began: float


class Uploads:
    """Gives each upload its turn, so that all of them together take at most *limit* bytes a second.

    ``count`` and ``bytes`` are what was sent, ``refused`` how often this host was too busy.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.count = self.bytes = self.refused = 0
        self._numbers = itertools.count(secrets.randbelow(10**14))  # nginx still reports those of an earlier server
        self._next_turn = 0.0
        self._active: dict[int, _Upload] = {}
        self._chunks: OrderedDict[Chunk, _Spreading] = OrderedDict()

    async def turn(self, chunk: Chunk, size: int, asker: str) -> int:
        """Wait until *size* bytes, which begin with a chunk, may be sent to a member; the number of the upload.

        Raises BusyError if that takes too long, or others can send them sooner.
        """
        spreading = self._spreading(chunk)
        now = trio.current_time()
        deadline = now + PATIENCE_S
        for number in [number for number, upload in self._active.items() if upload.began < now - LONGEST_S]:
            self.ended(number, 0, complete=False)  # nginx should have reported it long ago
        with suppress(ValueError):
            while True:
                spreading.holders.remove(asker)  # it has the chunk no more
        while spreading.active >= MOST_OF_CHUNK or (spreading.holders and len(self._active) >= MANY):
            if spreading.holders:
                raise self._refusal([spreading.holders.popleft()])
            if not await spreading.changed(deadline):
                raise self._refusal([])
        spreading.active += 1
        try:
            if self.limit is not None:
                await self._pace(size, self.limit)
        except BaseException:
            spreading.active -= 1
            spreading.wake(1)
            raise
        number = next(self._numbers)
        self._active[number] = _Upload(chunk=chunk, asker=asker, size=size, began=trio.current_time())
        return number

    async def _pace(self, size: int, limit: int) -> None:
        now = trio.current_time()
        turn = max(now, self._next_turn)
        if turn - now > PATIENCE_S:
            raise self._refusal([])
        self._next_turn = turn + size / limit
        await trio.sleep_until(turn)

    def _refusal(self, holders: list[str]) -> BusyError:
        self.refused += 1
        return BusyError(holders)

    def ended(self, number: int, sent: int, *, complete: bool) -> None:
        """Count an upload that nginx has ended after *sent* bytes; who got all of it can pass it on."""
        self.bytes += sent
        upload = self._active.pop(number, None)
        if upload is None:
            return
        spreading = self._spreading(upload.chunk)
        spreading.active -= 1
        holders = []
        if complete and sent >= upload.size:
            self.count += 1
            holders = [upload.asker] * REFERRALS if upload.asker else []
        spreading.holders.extend(holders)
        spreading.wake(1 + len(holders))

    def _spreading(self, chunk: Chunk) -> _Spreading:
        spreading = self._chunks.setdefault(chunk, _Spreading())
        self._chunks.move_to_end(chunk)
        while len(self._chunks) > KNOWN_CHUNKS and next(iter(self._chunks.values())).active == 0:
            self._chunks.popitem(last=False)
        return spreading

    async def run(self, reports: socket.socket) -> None:
        """Take nginx's reports until cancelled."""
        with trio.socket.from_stdlib_socket(reports) as receiving:
            while True:
                report = _REPORT.match(await receiving.recv(_REPORT_SIZE))
                if report is not None:
                    complete = report["complete"] is not None
                    self.ended(int(report["number"]), int(report["sent"]), complete=complete)
