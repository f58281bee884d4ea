"""Reopens: the server answers the open of a replaced file with ESTALE, and the kernel looks the name up again.

The kernel does so once for each open: a second ESTALE reaches the program as an error. So the server remembers which
opens it has answered with ESTALE. The ledger records them for the next server.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from trimsfs.handover.ledger import Ledger, RecordKind

REOPENED_WITHIN_S = 1.0
"""Seconds in which the kernel sends the reopen."""


@dataclass(slots=True)
class _Reopen:
    """A reopen that is expected since an instant; ``slot`` is its place in the ledger.

    ``under_way`` counts the opens in progress that may be it.
    """

    since: float
    slot: int
    under_way: int = 0


class Reopens:
    """The expected reopens, by thread and path. The number of a thread in another PID namespace is 0."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._expected: dict[tuple[int, str], _Reopen] = {}

    def restore(self) -> None:
        """Take over the reopens that the previous server expected."""
        for record in self._ledger.inherited(RecordKind.REOPEN):
            self._expect(record.number, os.fsdecode(record.content), record.slot)

    def request(self, thread: int, path: str) -> None:
        """Expect the reopen of an open that is about to be answered with ESTALE, unless it is a reopen itself.

        The reopen stays expected until the kernel has its answer (`completed`): if this server dies before, the next
        one gets the request again. It is forgotten if it does not come within REOPENED_WITHIN_S.
        """
        self._forget_expired()
        if (thread, path) not in self._expected:
            self._expect(thread, path, self._ledger.add(RecordKind.REOPEN, thread, os.fsencode(path)))

    def _expect(self, thread: int, path: str, slot: int) -> None:
        self._expected[thread, path] = _Reopen(trio.current_time(), slot)

    def _forget_expired(self) -> None:
        now = trio.current_time()
        while self._expected:
            key, reopen = next(iter(self._expected.items()))  # the oldest
            if now - reopen.since < REOPENED_WITHIN_S:
                break
            del self._expected[key]
            if reopen.under_way:
                reopen.since = now
                self._expected[key] = reopen
            else:
                self._ledger.set_count(reopen.slot, 0)

    def expected(self, thread: int, path: str) -> bool:
        """Whether an open of this path by this thread is a reopen."""
        return (thread, path) in self._expected

    @contextmanager
    def under_way(self, thread: int, path: str) -> Iterator[None]:
        """Keep a reopen expected for the length of the block, in which its open is under way."""
        reopen = self._expected.get((thread, path))
        if reopen is None:
            yield
            return
        reopen.under_way += 1
        try:
            yield
        finally:
            reopen.under_way -= 1
            if self._expected.get((thread, path)) is reopen:
                del self._expected[thread, path]  # so that it becomes the youngest
                reopen.since = trio.current_time()
                self._expected[thread, path] = reopen

    def completed(self, thread: int, path: str) -> None:
        """Record that the kernel has the handle of a reopen: the thread's next open of the path is a new one."""
        reopen = self._expected.pop((thread, path), None)
        if reopen is not None:
            self._ledger.set_count(reopen.slot, 0)
