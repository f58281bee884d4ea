"""Which opens have been sent back for the kernel to look their names up again: it does so only once for each."""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from trimsfs.handover.ledger import Ledger, RecordKind

SENT_BACK_S = 1.0
"""Within this time the kernel has come back to open what the name leads to."""


class SentBack:
    """The opens that were sent back a moment ago, by thread and path; also those that an earlier server sent back."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: dict[tuple[int, str], tuple[float, int]] = {}
        self._answering: dict[int, tuple[int, str]] = {}
        self._coming: Counter[tuple[int, str]] = Counter()

    def restore(self) -> None:
        """Take over what an earlier server has sent back."""
        for entry in self._ledger.taken(RecordKind.REOPEN):
            self._known[entry.number, os.fsdecode(entry.content)] = trio.current_time(), entry.slot

    def may(self, thread: int, path: str) -> bool:
        """Whether an open may be sent back; it counts as done. A thread of another PID namespace has no number.

        What was sent back stays known until the kernel has got an answer (`answering`, `answered`): of a server that
        dies before, the next is asked again. What has not come back for SENT_BACK_S is forgotten.
        """
        now = trio.current_time()
        while self._known:
            key, (when, slot) = next(iter(self._known.items()))
            if now - when < SENT_BACK_S:
                break
            del self._known[key]
            if self._coming[key]:
                self._known[key] = now, slot
            else:
                self._ledger.set(slot, 0)
        if (thread, path) in self._known:
            return False
        self._known[thread, path] = now, self._ledger.add(RecordKind.REOPEN, thread, os.fsencode(path))
        return True

    def has(self, thread: int, path: str) -> bool:
        """Whether an open was sent back a moment ago."""
        return (thread, path) in self._known

    def answering(self, thread: int, path: str, handle: int) -> None:
        """An open is about to be answered with a handle."""
        if (thread, path) in self._known:
            self._answering[handle] = thread, path

    def answered(self, handle: int) -> None:
        """The kernel has got a handle."""
        key = self._answering.pop(handle, None)
        known = self._known.pop(key, None) if key is not None else None
        if known is not None:
            self._ledger.set(known[1], 0)

    def not_answered(self, handle: int) -> None:
        """Nobody has a handle, perhaps because the kernel did not take it."""
        self._answering.pop(handle, None)

    @contextmanager
    def coming(self, thread: int, path: str) -> Iterator[None]:
        """A thread opens what it was sent back for, if it was; that may take long."""
        key = thread, path
        self._coming[key] += 1
        try:
            yield
        finally:
            self._coming[key] -= 1
            if not self._coming[key]:
                del self._coming[key]
            known = self._known.pop(key, None)
            if known is not None:
                self._known[key] = trio.current_time(), known[1]
