"""Which opens have been sent back for the kernel to look their names up again: it does so only once for each."""

import os
from collections import OrderedDict

import trio

from trimsfs.ledger import Kind, Ledger

SENT_BACK_S = 1.0
"""Within this time the kernel has come back to open what the name leads to."""


class SentBack:
    """The opens that were sent back a moment ago, by thread and path; also those that an earlier server sent back."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: OrderedDict[tuple[int, str], tuple[float, int]] = OrderedDict()

    def restore(self) -> None:
        """Take over what an earlier server has sent back."""
        for entry in self._ledger.taken(Kind.SENT_BACK):
            self._known[entry.number, os.fsdecode(entry.content)] = trio.current_time(), entry.slot

    def may(self, thread: int, path: str) -> bool:
        """Whether an open may be sent back; it counts as done. A thread of another PID namespace has no number."""
        now = trio.current_time()
        while self._known and now - next(iter(self._known.values()))[0] >= SENT_BACK_S:
            _, (_, slot) = self._known.popitem(last=False)
            self._ledger.set(slot, 0)
        if self.came(thread, path):
            return False
        self._known[thread, path] = now, self._ledger.add(Kind.SENT_BACK, thread, os.fsencode(path))
        return True

    def came(self, thread: int, path: str) -> bool:
        """A thread opens what it was sent back for; whether it was."""
        known = self._known.pop((thread, path), None)
        if known is not None:
            self._ledger.set(known[1], 0)
        return known is not None
