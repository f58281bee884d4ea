"""The trace of a cold open: what an open of a file that was not resident waited for, as spans.

What several opens may wait for (requests to the store, comparisons) happens for a blob, not for one of them. So spans
belong to the blob's `Activity`, and each trace takes those that overlap its open. Times are of `time.perf_counter`,
the monotonic clock that all processes of a host share.
"""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from trimsfs.telemetry.model_counters import shown

Why = Literal["resident", "disk", "store", "verification"]
"""What an open waits for: nothing, the local disk, bytes from the store, or a checksum, digest or signature."""

MOST_REQUESTS, MOST_SPANS = 96, 128
"""Requests and verified chunks of a trace, and spans of any kind; further ones are left out."""
REQUEST, VERIFY = "request", "verify"


class Spent:
    """What a request's time went to: ``first_byte`` is when that came, the others are sums of seconds.

    Checksums and writes take turns with the bytes that come.
    """

    __slots__ = ("checksum_s", "first_byte", "write_s")

    def __init__(self) -> None:
        self.first_byte = self.checksum_s = self.write_s = 0.0


class Span:
    """An interval with a name; ``ended`` is None while it lasts. ``spent`` is of a request that has succeeded."""

    __slots__ = ("_spent", "_whole", "began", "ended", "facts", "name")

    def __init__(
        self, name: str, began: float, ended: float | None = None, facts: dict[str, Any] | None = None
    ) -> None:
        self.name = name
        self.began = began
        self.ended = ended
        self.facts = facts or {}
        self._spent: Spent | None = None
        self._whole: Span | None = None

    @property
    def spent(self) -> Spent | None:
        # The last chunk lands, and an open is answered, a moment before the request tells what it has spent.
        return self._spent if self._whole is None else self._whole.spent

    @spent.setter
    def spent(self, spent: Spent) -> None:
        self._spent = spent

    def since(self, began: float, now: float) -> "Span":
        """The part of it from a time on, until now at most."""
        span = Span(self.name, max(self.began, began), self.ended or now, self.facts)
        span._whole = self
        return span


class Activity:
    """What is under way for a blob, and for as long as traces watch it what has ended."""

    __slots__ = ("spans", "watchers")

    def __init__(self) -> None:
        self.spans: dict[Span, None] = {}
        self.watchers = 0


class Subject(Protocol):
    """A blob."""

    activity: Activity | None

    @property
    def complete(self) -> bool: ...


@contextmanager
def spanning(subject: Subject, name: str, **facts: Any) -> Iterator[Span]:
    """A span of a blob's activity, for the length of the block."""
    activity = subject.activity
    if activity is None:
        activity = subject.activity = Activity()
    span = Span(name, time.perf_counter(), None, facts)
    if len(activity.spans) < (MOST_REQUESTS if name in {REQUEST, VERIFY} else MOST_SPANS):
        activity.spans[span] = None
    try:
        yield span
    except BaseException as error:
        span.facts["error"] = type(error).__name__
        raise
    finally:
        span.ended = time.perf_counter()
        if not activity.watchers:
            activity.spans.pop(span, None)
            if not activity.spans and subject.activity is activity:
                subject.activity = None


class OpenTrace:
    """The open of a file by a thread, from its first lookup until it is answered. For a file that is streamed, it lasts
    until all of it has come or it is closed. ``kept`` tells whether its spans are wanted."""

    __slots__ = (
        "_clock",
        "_number",
        "_subject",
        "_taken_until",
        "_watched_since",
        "answered",
        "began",
        "error",
        "has_read",
        "kept",
        "opened",
        "path",
        "size",
        "spans",
        "thread",
        "why",
    )

    def __init__(self, path: str, thread: int, lookups: list[Span], *, kept: bool) -> None:
        self.path = path
        self.thread = thread
        self.kept = kept
        self.opened = time.perf_counter()
        self.began = lookups[0].began if lookups else self.opened
        self.spans = [*lookups, *_between(lookups, self.opened)]
        self.why: Why | None = None
        self.size = 0
        self.answered: float | None = None
        self.error: str | None = None
        self.has_read = False
        self._clock = time.time() - self.opened
        self._number = random.getrandbits(128) if kept else 0
        self._subject: Subject | None = None
        self._taken_until = self.opened
        self._watched_since: float | None = None

    @contextmanager
    def spanning(self, name: str) -> Iterator[None]:
        """A span of this open alone."""
        span = Span(name, time.perf_counter())
        self.spans.append(span)
        try:
            yield
        finally:
            span.ended = time.perf_counter()

    def watch(self, subject: Subject) -> None:
        """Take the spans of a blob from now on, until `unwatch`."""
        if not self.kept:
            return
        if subject.activity is None:
            subject.activity = Activity()
        subject.activity.watchers += 1
        self._subject = subject
        self._watched_since = self._watched_since or time.perf_counter()

    def unwatch(self) -> None:
        """Keep what has come so far."""
        subject, self._subject = self._subject, None
        if subject is None or subject.activity is None:
            return
        activity = subject.activity
        self.spans += self._taken(activity)
        self._taken_until = time.perf_counter()
        activity.watchers -= 1
        if not activity.watchers:
            activity.spans = {span: None for span in activity.spans if span.ended is None}
            if not activity.spans:
                subject.activity = None

    def _taken(self, activity: Activity) -> list[Span]:
        """A blob's spans, as far as they overlap this open and were not taken before."""
        since, now = self._taken_until, time.perf_counter()
        return [span.since(since, now) for span in activity.spans if (span.ended or now) > since]

    def settle(self) -> None:
        """End the trace of a streamed file all of which has come."""
        subject = self._subject
        if self.answered is None or subject is None or subject.activity is None or not subject.complete:
            return
        if all(span.ended is not None for span in subject.activity.spans):
            self.unwatch()

    def facts(self) -> dict[str, Any]:
        """The trace as a control file shows it. Times are in seconds: ``began`` since the epoch, ``start`` of spans
        since then."""
        done = self._subject is None and self.answered is not None
        live = self._taken(self._subject.activity) if self._subject is not None and self._subject.activity else []
        spans = sorted([*self.spans, *live], key=lambda span: span.began)
        ends = [span.ended for span in spans if span.ended is not None]
        ended = max([*ends, self.answered or self.opened])
        return {
            "id": f"{self._number:032x}",
            "path": shown(self.path),
            "thread": self.thread,
            "why": self.why,
            "size": self.size,
            "began": self._clock + self.began,
            "duration": ended - self.began,
            "open_duration": None if self.answered is None else self.answered - self.opened,
            "done": done,
            "error": self.error,
            "spans": [self._as_dict(span) for span in [*self._waits(spans), *spans]],
        }

    def _waits(self, spans: list[Span]) -> list[Span]:
        """The time until the first request of the file began."""
        first = next((span for span in spans if span.name == REQUEST), None)
        if first is None or self._watched_since is None or first.began <= self._watched_since:
            return []
        return [Span("wait", self._watched_since, first.began)]

    def _as_dict(self, span: Span) -> dict[str, Any]:
        ended = span.ended if span.ended is not None else time.perf_counter()
        place = {"name": span.name, "start": span.began - self.began, "duration": ended - span.began}
        parts = [self._as_dict(part) for part in _parts(span)]
        return place | ({"facts": span.facts} if span.facts else {}) | ({"parts": parts} if parts else {})


def _between(lookups: list[Span], opened: float) -> list[Span]:
    """The turns of the kernel and the program between their lookups and the open."""
    begins = [span.began for span in lookups[1:]] + [opened]
    return [Span("kernel", span.ended or began, began) for span, began in zip(lookups, begins, strict=False)]


def _parts(span: Span) -> list[Span]:
    """The parts of a request. The first lasts until the first byte. Then come, as their sums one after another,
    receiving bytes, their checksums, and writing them to the disk."""
    spent, ended = span.spent, span.ended
    if spent is None or ended is None:
        return []
    first_byte = min(max(span.began, spent.first_byte), ended)
    written = max(first_byte, ended - spent.write_s)
    received = max(first_byte, written - spent.checksum_s)
    return [
        Span("first byte", span.began, first_byte),
        Span("receive", first_byte, received),
        Span("checksum", received, written),
        Span("write", written, ended),
    ]
