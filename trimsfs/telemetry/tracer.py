"""The tracer: times all opens, and keeps the traces of the last cold ones."""

import random
import time
from collections import OrderedDict, deque
from collections.abc import Iterator

from trimsfs.telemetry.histogram import Histogram
from trimsfs.telemetry.model_counters import ModelCounters, Tier
from trimsfs.telemetry.open_trace import OpenTrace, Span, Subject, Why

KEPT = 64
"""Traces that are kept."""
REOPENED_WITHIN_S = 1.0
"""An open that is answered ESTALE goes on within this time, or is over."""
MOST_REOPENS, MOST_THREADS = 512, 256
"""Opens that may go on so; threads whose last lookups are known."""
LOOKED_UP_WITHIN_S = 0.005
"""A lookup that is followed by another, or by an open, within this time is a part of it."""
MOST_LOOKUPS = 16
TIERS: dict[Why, Tier] = {"resident": "host", "disk": "disk", "verification": "disk", "store": "store"}


class Tracer:
    """Of the opens that find their file not resident, the *share* (0 to 1) is traced; ``models`` counts all opens."""

    def __init__(self, *, share: float) -> None:
        self.models = ModelCounters()
        self._share = share
        self.open_seconds = Histogram("why", TIERS)
        self.first_byte_seconds = Histogram()
        self._lookups = OrderedDict[int, list[Span]]()
        self._reopens: dict[tuple[int, str], OpenTrace] = {}
        self._kept = deque[OpenTrace](maxlen=KEPT)

    def looked_up(self, thread: int, path: str, began: float) -> None:
        """A thread has looked a name up, which may have waited for the store. 0 is not known to be one thread."""
        if thread == 0 or self._share == 0:
            return
        span = Span("lookup", began, time.perf_counter(), {"path": path})
        self._lookups[thread] = [*self._recent(thread, began), span][-MOST_LOOKUPS:]
        while len(self._lookups) > MOST_THREADS:
            self._lookups.popitem(last=False)

    def _recent(self, thread: int, now: float) -> list[Span]:
        """The lookups of a thread that lead to what it does now."""
        lookups = self._lookups.pop(thread, [])
        return lookups if lookups and now - (lookups[-1].ended or now) < LOOKED_UP_WITHIN_S else []

    def begin(self, thread: int, path: str) -> OpenTrace:
        """The trace of an open that is about to be answered: a new one, or that of an open that was answered ESTALE."""
        now = time.perf_counter()
        trace = self._reopens.pop((thread, path), None)
        if trace is not None and self._goes_on(trace, now):
            return trace
        kept = self._share > 0 and random.random() < self._share  # noqa: S311 - a sample
        return OpenTrace(path, thread, self._recent(thread, now), kept=kept)

    def _goes_on(self, trace: OpenTrace, now: float) -> bool:
        """Whether the open of a trace, which was answered ESTALE, goes on now; else it is over."""
        assert trace.answered is not None
        if now - trace.answered > REOPENED_WITHIN_S:
            self._over(trace)
            return False
        trace.spans.append(Span("reopen", trace.answered, now))
        return True

    def about(self, trace: OpenTrace, why: Why, size: int, subject: Subject) -> None:
        """What the open waits for, and the blob that it waits for."""
        if trace.why is None:
            trace.why, trace.size = why, size
        if trace.why != "resident":
            trace.watch(subject)

    def look_up_again(self, trace: OpenTrace) -> None:
        """The open is answered ESTALE: the kernel looks the name up and opens it once more."""
        trace.unwatch()
        trace.answered = now = time.perf_counter()
        self._reopens[trace.thread, trace.path] = trace
        for key, other in list(self._reopens.items())[:2]:  # the oldest
            assert other.answered is not None
            if now - other.answered > REOPENED_WITHIN_S or len(self._reopens) > MOST_REOPENS:
                self._over(self._reopens.pop(key))

    def reopened(self, thread: int, path: str) -> None:
        """An open that was answered ESTALE has been answered with a handle that the kernel reads by itself."""
        now = time.perf_counter()
        trace = self._reopens.pop((thread, path), None)
        if trace is not None and self._goes_on(trace, now):
            trace.answered = now
            self._over(trace)

    def answered(self, trace: OpenTrace, *, streams: bool) -> bool:
        """The open is answered; whether its trace goes on, with the bytes that come, until `closed`."""
        trace.answered = time.perf_counter()
        goes_on = streams and trace.why != "resident"
        if not goes_on:
            trace.unwatch()
        self._over(trace, streams=goes_on)
        return goes_on

    def failed(self, trace: OpenTrace, error: BaseException) -> None:
        """The open is answered with an error."""
        trace.unwatch()
        trace.answered, trace.error = time.perf_counter(), type(error).__name__
        self._over(trace)

    def _over(self, trace: OpenTrace, *, streams: bool = False) -> None:
        """Count an open that is answered."""
        why = trace.why
        if trace.answered is None or why is None:
            return  # it failed before anything was known of the file
        waited = trace.answered - trace.opened
        self.open_seconds.observe(waited, why)
        if trace.error is None:
            self.models.opened(trace.path, TIERS[why])
        if why == "resident":
            return
        if not streams and trace.error is None:
            self.first_byte_seconds.observe(waited)
        if trace.kept:
            self._kept.append(trace)

    def has_read(self, trace: OpenTrace, began: float) -> None:
        """A read of a file that is streamed, which *began* then, is answered."""
        if trace.has_read or trace.answered is None:
            return
        trace.has_read = True
        now = time.perf_counter()
        trace.spans.append(Span("first read", began, now))
        self.first_byte_seconds.observe(trace.answered - trace.opened + now - began)

    def closed(self, trace: OpenTrace) -> None:
        """A file that is streamed was closed."""
        trace.unwatch()

    def traces(self) -> Iterator[OpenTrace]:
        """The traces that are kept, the oldest first."""
        for trace in list(self._kept):
            trace.settle()
            yield trace
