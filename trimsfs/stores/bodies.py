"""Bodies of a store's answers: passed on as they arrive, within the stall timeout; short ones read whole."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any, TypeVar

import trio

from trimsfs.errors import StoreSlowError, StoreStalledError, TransientStoreError
from trimsfs.stores.base import Sink
from trimsfs.stores.receive_loop import PIECE, Body, receive

T = TypeVar("T")

METADATA_THREADS = 8
"""Most requests to a store at once that are no reads."""
CONNECT_TIMEOUT_S = 3.0
SLOWEST_RATE = 64 * 1024
"""Bytes a second under which a response counts as slow."""
FAIR_SHARE = 1 / 4
"""Of what a response would get if all shared the link evenly: no less counts as slow while the link is the limit."""
MOST_PATIENCE = 8
"""By how much the least rate is divided while responses are slow again and again; below that, a response stalls."""
PATIENCE_S = 60.0
"""How long after the last slow response the least rate is a whole one again."""
MOST_SLOW_INTERVALS = 4
"""Stall timeouts in a row in which a response may be slow: the link may not be slow any more for another request."""
ANSWER_LIMIT = 4 << 20
"""Bytes of the longest answer: enough for 1000 names of 1024 bytes, each byte escaped as three."""

MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, SyntaxError, TypeError, ValueError)
"""What parsers raise on an answer that is not the service's; ElementTree raises SyntaxErrors."""


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


class RequestThreads:
    """The threads in which a store makes requests: at most *max_requests* reads at once, and METADATA_THREADS others.

    A short answer is abandoned after twice the stall timeout, a long body once it has come more slowly than is ever
    borne, all in all: clients have no timeout for what drips in byte by byte. Messages name the *subject*.
    """

    def __init__(self, subject: object, *, max_requests: int, stall_timeout_s: float) -> None:
        self._subject = subject
        self._stall_timeout_s = stall_timeout_s
        self._reads = trio.CapacityLimiter(max_requests)
        self.others = trio.CapacityLimiter(METADATA_THREADS)

    async def ask(self, function: Callable[[], T]) -> T:
        """Make a request that is no read. Raises StoreStalledError."""
        return await self._run(function, self.others, 2 * self._stall_timeout_s)

    async def read(
        self,
        get: Callable[[], tuple[Body, T]],
        length: int,
        sink: Sink,
        *,
        translated: Callable[[Callable[[], Any]], Any],
    ) -> T:
        """Pass the *length* bytes of an answer on, which *get* asks for; what it tells beside the body.

        *translated* calls a function, and raises StoreErrors only. After an error, a thread may still call *sink* for a
        moment.
        """

        progress = _Progress(self._stall_timeout_s, MOST_SLOW_INTERVALS * self._stall_timeout_s + length / SLOWEST_RATE)

        def receive(body: Body, sink: Sink) -> None:
            def pass_on_counted() -> None:
                with closing(body):
                    pass_on(body, length, sink, stall_timeout_s=self._stall_timeout_s, progress=progress)

            translated(pass_on_counted)

        def get_small() -> tuple[bytes, T]:
            body, told = get()
            data = bytearray()
            receive(body, data.extend)
            return bytes(data), told

        async def read() -> T:
            timeout_s = 2 * self._stall_timeout_s
            if length <= PIECE:  # in one call: another switch of threads takes longer than a few bytes
                small: tuple[bytes, T] = await self._run(partial(translated, get_small), self._reads, timeout_s)
                sink(small[0])
                return small[1]
            # In two calls, so that an abandoned thread whose answer begins late passes nothing on.
            answer: tuple[Body, T] = await self._run(partial(translated, get), self._reads, timeout_s)
            with progress.bound() as scope:
                await self._run(partial(receive, answer[0], sink), self._reads, math.inf)
            if scope.cancelled_caught:
                raise self._unanswered(progress.took_s)
            return answer[1]

        try:
            return await read()
        except StoreStalledError as error:
            if progress.is_answer():
                raise StoreSlowError(str(error)) from error
            raise

    async def _run(self, function: Callable[[], T], limiter: trio.CapacityLimiter, timeout_s: float) -> T:
        try:
            with trio.fail_after(timeout_s):
                return await trio.to_thread.run_sync(function, limiter=limiter, abandon_on_cancel=True)
        except trio.TooSlowError:
            raise self._unanswered(timeout_s) from None

    def _unanswered(self, timeout_s: float) -> StoreStalledError:
        return StoreStalledError(f"{self._subject}: no complete answer in {timeout_s:.3g} s")


class _Progress:
    """How much of a body has come, and how long the rest may take.

    A body has *bound_s* seconds, and more while it comes at the least rate that is ever borne: what many share a slow
    link for takes long, what a client waits for without a piece ends.
    """

    def __init__(self, stall_timeout_s: float, bound_s: float) -> None:
        self.bound_s = bound_s
        self._stall_timeout_s = stall_timeout_s
        self._began = self._told = time.monotonic()
        self._came = 0
        self._token = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()

    @contextmanager
    def bound(self) -> Iterator[trio.CancelScope]:
        """Cancel the block once the time is over."""
        self._scope.deadline = trio.current_time() + self.bound_s
        with self._scope:
            yield self._scope

    def begins(self) -> None:
        """A thread begins to receive it."""
        self._began = self._told = time.monotonic()

    def has_come(self, count: int) -> None:
        """A thread has received so many bytes in all."""
        self._came = count
        now = time.monotonic()
        if now - self._told > self._stall_timeout_s and self.is_answer():
            self._told = now
            self._token.run_sync_soon(self._go_on)

    @property
    def took_s(self) -> float:
        """Seconds since its thread has begun to receive it."""
        return time.monotonic() - self._began

    def is_answer(self) -> bool:
        """Whether the store has answered: it has sent at least what is borne of a slow link."""
        return bool(self._came) and self._came >= (time.monotonic() - self._began) * SLOWEST_RATE / MOST_PATIENCE

    def _go_on(self) -> None:
        self._scope.deadline = max(self._scope.deadline, trio.current_time() + 3 * self._stall_timeout_s)


class _StorePace:
    """Ends a body that brings too few bytes in a stall timeout, beside what its link brings in all.

    A read without a byte ends by itself, as the stall timeout is that of the socket.
    """

    def __init__(self, length: int, stall_timeout_s: float, progress: _Progress | None) -> None:
        self._length = length
        self._stall_timeout_s = stall_timeout_s
        self._progress = progress
        if progress is not None:
            progress.begins()
        self._done = self._mark = self._slow_intervals = 0
        self._all_mark, self._marked = _link.bytes, time.monotonic()

    def check(self, done: int) -> None:
        """Raises StoreStalledError, or StoreSlowError if a slow link is to blame."""
        _link.add(done - self._done)
        self._done = done
        if self._progress is not None:
            self._progress.has_come(done)
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


def pass_on(body: Body, length: int, sink: Sink, *, stall_timeout_s: float, progress: _Progress | None = None) -> None:
    """Pass the next *length* bytes of a body on, and tell the *progress*.

    Raises TransientStoreError if it ends before, StoreStalledError if bytes stop coming, StoreSlowError if few come.
    """
    with _link.shared():
        receive(body, length, sink, _StorePace(length, stall_timeout_s, progress))


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
                raise TransientStoreError(f"answer larger than {limit >> 20} MiB")
            if time.monotonic() > deadline:
                raise StoreStalledError(f"no complete answer in {timeout_s:g} s")
    except BaseException:
        raw.close()
        raise
    raw.release_conn()
    return b"".join(pieces)
