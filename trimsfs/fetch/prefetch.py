"""The prefetch of one blob: which of its chunks are still to come, and how soon."""

import enum
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from trimsfs.errors import TrimsError
from trimsfs.tiers.blob import Blob, ChunkState


class Urgency(enum.IntEnum):
    """Why the rest of a blob is fetched; the most urgent reason comes first."""

    WANTED = 0
    """A caller waits for the whole blob."""
    READ = 1
    """A reader has it open."""
    AHEAD = 2
    """A program may open it soon."""
    COMMAND = 3
    """A command wants it on the disk: no program waits."""


class Prefetch:
    """The chunks of one blob still to prefetch: those after the last demanded one, then those before it.

    ``holders`` counts the handles and commands that keep it going. ``touched`` says that a reader wanted bytes.
    ``callers`` counts by urgency those that wait for the whole blob, or prefetch it; ``error`` tells them why the
    prefetch stopped. ``paused`` says that readers want only what they ask for.
    """

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.holders = 0
        self.callers = Counter[Urgency]()
        self._guesses = 0
        self.touched = self.paused = False
        self.error: TrimsError | None = None
        self._changed = trio.Event()
        self._cursor = 0
        self._left = len(blob.states)

    @property
    def left(self) -> int:
        """The number of chunks not considered yet."""
        return self._left

    @contextmanager
    def asked_for(self, urgency: Urgency, *, guessed: bool = False) -> Iterator[None]:
        """Count a caller for the length of the block: one that waits for the whole blob or, if it is AHEAD, prefetches
        it, perhaps only because a program has listed it (*guessed*)."""
        self.callers[urgency] += 1
        self._guesses += guessed
        self.error, self.paused = None, False
        if urgency is Urgency.WANTED:
            self.touched = True  # if the caller gives up, the file may still be open
        if urgency is not Urgency.AHEAD or self._left == 0:
            self.restart()
        try:
            yield
        finally:
            self.callers[urgency] -= 1
            self._guesses -= guessed

    @property
    def waited_for(self) -> bool:
        """Whether a caller waits for the whole blob."""
        return bool(self.callers[Urgency.WANTED] or self.callers[Urgency.COMMAND])

    @property
    def in_background(self) -> bool:
        """Whether no program waits for it, nor loads a model that it is a part of."""
        return not (self.touched or self.callers[Urgency.WANTED] or self.callers[Urgency.AHEAD] > self._guesses)

    def next_chunk(self) -> int | None:
        """The next chunk that is not verified; None if none is left."""
        states = self.blob.states
        while self._left > 0:
            chunk = self._cursor
            self._cursor = (chunk + 1) % len(states)
            self._left -= 1
            if states[chunk] != ChunkState.VERIFIED:
                return chunk
        return None

    @property
    def urgency(self) -> Urgency | None:
        """How soon the next chunk should start; None if it should not."""
        if self.callers[Urgency.WANTED]:
            return Urgency.WANTED
        if self.touched:
            return Urgency.READ
        if self.callers[Urgency.AHEAD] and self.error is None:
            return Urgency.AHEAD
        return Urgency.COMMAND if self.callers[Urgency.COMMAND] else None

    def left_by_readers(self) -> None:
        """If only commands and prefetches hold it by now, no reader wants it any more."""
        if self.holders == self.callers.total() and not self.callers[Urgency.WANTED]:
            self.touched = False

    def put_back(self) -> None:
        """Undo the last `next_chunk`."""
        self._cursor = (self._cursor - 1) % len(self.blob.states)
        self._left += 1

    def demand(self, chunk: int) -> None:
        """Continue after *chunk*, where a reader is: it most likely wants the following chunks next."""
        self.touched, self.paused = True, False
        self._go_to(chunk + 1)

    def pause(self) -> None:
        """Stop prefetching for a reader that reads at random."""
        self.touched, self.paused = False, not self.callers.total()

    def restart(self) -> None:
        """Consider all chunks again, from the first."""
        self._go_to(0)

    def _go_to(self, chunk: int) -> None:
        self._cursor = chunk % max(1, len(self.blob.states))
        self._left = len(self.blob.states)

    def stop(self, error: TrimsError) -> None:
        """Stop with an *error*: the rest cannot be fetched for now."""
        self.touched = False
        self.error = error
        self.tell()

    def tell(self) -> None:
        """Wake the callers that wait for the whole blob: something has changed."""
        self._changed.set()
        self._changed = trio.Event()

    async def changed(self) -> None:
        await self._changed.wait()
