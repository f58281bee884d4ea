"""Bodies of a store's answers: passed on as they arrive, within the stall timeout; short ones read whole."""

import http.client
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, Protocol, TypeVar

import trio
from urllib3.connection import HTTPConnection

from trimsfs.errors import StoreSlowError, StoreStalledError, TransientStoreError
from trimsfs.stores.base import Sink
from trimsfs.stores.http.receive_loop import PIECE, Body, receive
from trimsfs.stores.stall_guard import StallGuard

T = TypeVar("T")

METADATA_THREADS = 8
"""Most requests to a store at once that are no reads."""
CONNECT_TIMEOUT_S = 3.0
SLOWEST_RATE = 64 * 1024
"""Bytes a second under which a response counts as slow."""
FAIR_SHARE = 1 / 4
"""While the link is the limit, a response with at least this share of what it would get if all shared it evenly never
counts as slow."""
MOST_PATIENCE = 8
"""By how much the least rate is divided while responses are slow again and again; below that, a response stalls."""
PATIENCE_S = 60.0
"""How long after the last slow response the least rate is a whole one again."""
LONGEST_SILENCE = 3
"""Stall timeouts after which the event loop gives up a thread that no longer judges its body."""
SHORT_ANSWER = 2
"""Stall timeouts that a short answer may take."""
MOST_SLOW_INTERVALS = 4
"""Stall timeouts in a row in which a response may be slow: the link may not be slow any more for another request."""
MOST_INTERIM = 16
"""Interim answers (1xx) that may come before an answer."""
ANSWER_LIMIT = 4 << 20
"""Bytes of the longest answer: enough for 1000 names of 1024 bytes, each byte escaped as three."""


def check_range(headers: Mapping[str, str], start: int, length: int, size: int) -> None:
    """Raises TransientStoreError unless an answer has the *length* bytes from *start* on of *size*, and nothing else.

    A proxy that compresses a range changes its length, if it tells one, but not what the range is called.
    """
    expected, sent = f"bytes {start}-{start + length - 1}/{size}", headers.get("content-range")
    if sent != expected:
        raise TransientStoreError(f"asked for {expected}, got {sent or 'no range'}")
    brought = headers.get("content-length")
    if brought not in {None, str(length)} or (brought is None and "content-encoding" in headers):
        raise TransientStoreError(f"asked for {length} bytes, got {brought or 'compressed ones'}: a proxy changes them")


class _Link:
    """What all bodies share that this process receives: ``bytes`` came so far."""

    def __init__(self) -> None:
        self.bytes = 0
        self._bodies = 0
        self._slow_since = self._slow_at = -math.inf
        self._lock = threading.Lock()

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Count a body for the length of the block."""
        with self._lock:
            self._bodies += 1
        try:
            yield
        finally:
            with self._lock:
                self._bodies -= 1

    def add(self, count: int) -> None:
        with self._lock:
            self.bytes += count

    def least_rate(self, rate: float) -> float:
        """Bytes a second under which a body counts as slow, if all together come at a *rate*."""
        return SLOWEST_RATE if rate < SLOWEST_RATE else min(SLOWEST_RATE, FAIR_SHARE * rate / max(1, self._bodies))

    def bears(self, share: float, interval_s: float) -> bool:
        """Whether a slow body, which brings a *share* of the least rate, goes on.

        The first ones do not: other requests may bring the bytes sooner. If those are slow *interval_s* seconds later,
        others crowd the link, and giving up only wastes what has come.
        """
        if not _may_be_borne(share):
            return False
        with self._lock:
            now = time.monotonic()
            if now - self._slow_at > max(PATIENCE_S, MOST_PATIENCE * interval_s):
                self._slow_since = now
            self._slow_at = now
            return now - self._slow_since >= interval_s


def _may_be_borne(share: float) -> bool:
    """Whether a body that brings a *share* of the least rate may go on once others are as slow."""
    return share * MOST_PATIENCE >= 1


_link = _Link()


class _FinalResponse(http.client.HTTPResponse):
    """The answer to a request. Python's own class passes over ``100 Continue`` alone, and takes any other interim
    answer, as ``103 Early Hints``, for the answer."""

    def _read_status(self) -> tuple[str, int, str]:
        for _ in range(MOST_INTERIM + 1):
            version, status, reason = super()._read_status()  # type: ignore[misc]  # as botocore overrides it
            if not 100 <= status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)
        raise http.client.HTTPException(f"more than {MOST_INTERIM} interim answers")


HTTPConnection.response_class = _FinalResponse  # of the SDK's connections, too, which are made from these


class Translate(Protocol):
    """Calls a function that makes requests about a *key*, which may be empty. Raises StoreErrors for what the store
    does."""

    def __call__(self, function: Callable[[], T], key: str, /) -> T: ...


class RequestThreads:
    """The threads in which a store makes requests: at most *max_requests* reads at once, and METADATA_THREADS others.

    A short answer is abandoned after twice the stall timeout, a long body once its thread is silent. Messages name the
    *subject*; *translate* gives the errors of requests.
    """

    def __init__(self, subject: object, translate: Translate, *, max_requests: int, stall_timeout_s: float) -> None:
        self._subject = subject
        self._translate = translate
        self._stall_timeout_s = stall_timeout_s
        self._reads = trio.CapacityLimiter(max_requests)
        self._others = trio.CapacityLimiter(METADATA_THREADS)

    async def ask(self, function: Callable[[], T], key: str = "") -> T:
        """Make a request that is no read. Raises StoreErrors."""
        return await self._run(partial(self._translate, function, key), self._others)

    async def read(self, get: Callable[[], tuple[Body, T]], length: int, sink: Sink, key: str) -> T:
        """Pass the *length* bytes of an answer on, which *get* asks for; what it tells beside the body.

        Raises StoreErrors. After one, a thread may still call *sink* for a moment.
        """
        guard = self._guard(LONGEST_SILENCE)
        watch = _Watch(length, self._stall_timeout_s, guard.progress)

        def receive(body: Body, sink: Sink) -> None:
            def pass_on_to_sink() -> None:
                with closing(body):
                    _pass_on(body, length, sink, watch)

            self._translate(pass_on_to_sink, key)

        def get_small() -> tuple[bytes, T]:
            body, facts = get()
            data = bytearray()
            receive(body, data.extend)
            return bytes(data), facts

        async def read() -> T:
            if length <= PIECE:  # in one call: another switch of threads takes longer than a few bytes
                small: tuple[bytes, T] = await self._run(partial(self._translate, get_small, key), self._reads)
                sink(small[0])
                return small[1]
            # In two calls, so that an abandoned thread whose answer begins late passes nothing on.
            answer: tuple[Body, T] = await self._run(partial(self._translate, get, key), self._reads)
            await guard.call(partial(receive, answer[0], sink), self._reads, self._subject)
            return answer[1]

        try:
            return await read()
        except StoreStalledError as error:
            if watch.is_answer:
                raise StoreSlowError(str(error)) from error
            raise

    async def _run(self, function: Callable[[], T], limiter: trio.CapacityLimiter) -> T:
        return await self._guard(SHORT_ANSWER).call(function, limiter, self._subject)

    def _guard(self, stall_timeouts: int) -> StallGuard:
        return StallGuard(stall_timeouts * self._stall_timeout_s, missing="complete answer")


class _Watch:
    """The rule for a stall: in each stall timeout, a body brings its share of what its link brings in all, or ends.

    The thread that receives it judges that. A read without a byte ends by itself: the stall timeout is also that of the
    socket. A client that reads on and on without a piece judges nothing. The event loop hears each time that the thread
    has *judged*, and gives up a thread that stays silent.
    """

    def __init__(self, length: int, stall_timeout_s: float, judged: Callable[[], None] = lambda: None) -> None:
        self._length = length
        self._stall_timeout_s = stall_timeout_s
        self._judged = judged
        self._done = self._mark = self._slow_intervals = 0
        self._began = self._marked = time.monotonic()
        self._all_mark = 0

    def begin(self) -> None:
        """The thread begins to receive the body."""
        self._began = self._marked = time.monotonic()
        self._all_mark = _link.bytes

    @property
    def is_answer(self) -> bool:
        """Whether the store has answered: it has sent at least what is borne of a slow link."""
        return bool(self._done) and self._done >= (time.monotonic() - self._began) * SLOWEST_RATE / MOST_PATIENCE

    def check(self, done: int) -> None:
        """Judge the body. Raises StoreStalledError, or StoreSlowError if a slow link is to blame."""
        _link.add(done - self._done)
        self._done = done
        elapsed = time.monotonic() - self._marked
        if elapsed <= self._stall_timeout_s or done >= self._length:
            return
        came = done - self._mark
        share = came / (elapsed * _link.least_rate((_link.bytes - self._all_mark) / elapsed))
        self._slow_intervals = self._slow_intervals + 1 if share < 1 else 0
        if self._slow_intervals > MOST_SLOW_INTERVALS or (
            self._slow_intervals and not _link.bears(share, self._stall_timeout_s)
        ):
            slow = StoreSlowError if _may_be_borne(share) else StoreStalledError
            raise slow(f"only {came} bytes in {elapsed:.0f} s")
        self._mark, self._marked, self._all_mark = done, time.monotonic(), _link.bytes
        self._judged()


def pass_on(body: Body, length: int, sink: Sink, *, stall_timeout_s: float) -> None:
    """Pass the next *length* bytes of a body on.

    Raises TransientStoreError if it ends before, StoreStalledError if bytes stop coming, StoreSlowError if few come.
    """
    _pass_on(body, length, sink, _Watch(length, stall_timeout_s))


def _pass_on(body: Body, length: int, sink: Sink, watch: _Watch) -> None:
    with _link.shared():
        watch.begin()
        receive(body, length, sink, watch)


def received(raw: Any, timeout_s: float, *, limit: int = ANSWER_LIMIT) -> bytes:
    """The whole body of urllib3's stream *raw*, at most *limit* bytes.

    Raises TransientStoreError when it is too long or too slow.
    """
    deadline = time.monotonic() + timeout_s
    pieces, size = [], 0
    try:
        while piece := raw.read1(1 << 16):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise TransientStoreError(f"answer larger than {limit / (1 << 20):g} MiB")
            if time.monotonic() > deadline:
                raise StoreStalledError(f"no complete answer in {timeout_s:g} s")
    except BaseException:
        raw.close()
        raise
    raw.release_conn()
    return b"".join(pieces)
