"""Reopens: an open that is answered ESTALE makes the kernel look the name up again, and open what it finds.

The kernel does so once for each open: a second ESTALE would be an error of the program. So the server remembers which
opens it has answered so, and its successor finds them in the ledger.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import trio

from trimsfs.concurrency.background import Background
from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.tiers.blob import Blob

REOPENED_WITHIN_S = 1.0
"""Within this time the kernel has come back to open what the name leads to."""
KEPT_FOR_S = 0.4
"""How long a blob is kept from eviction for a reopen."""


@dataclass(slots=True)
class _Reopen:
    """A reopen that is expected since a time; ``slot`` is its place in the ledger.

    ``under_way`` counts the opens that may be it; ``arrived`` is set when one of them is about to be answered.
    """

    since: float
    slot: int
    under_way: int
    arrived: trio.Event


class Reopens:
    """The reopens that are expected, by thread and path. A thread of another PID namespace has the number 0."""

    def __init__(self, ledger: Ledger, release: Callable[[Blob], None]) -> None:
        self._ledger = ledger
        self._release = release
        self._expected: dict[tuple[int, str], _Reopen] = {}
        self._background = Background()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep blobs that are about to be reopened, for as long as the server runs."""
        await self._background.run(task_status)

    def restore(self) -> None:
        """Take over the reopens that the server before this one expected."""
        for record in self._ledger.inherited(RecordKind.REOPEN):
            self._expect(record.number, os.fsdecode(record.content), record.slot)

    def request(self, thread: int, path: str, *, keep: Blob | None = None) -> bool:
        """Whether the caller may answer an open with ESTALE: not if it is a reopen itself. It counts as answered so.

        The reopen stays expected until the kernel has its answer (`completed`), as the next server gets the request
        again if this one dies before; one that has not come within REOPENED_WITHIN_S is forgotten. A blob to *keep* is
        not evicted for KEPT_FOR_S, or until the thread has come back.
        """
        self._forget_expired()
        if (thread, path) in self._expected:
            return False
        slot = self._ledger.add(RecordKind.REOPEN, thread, os.fsencode(path))
        reopen = self._expect(thread, path, slot)
        if keep is not None and self._background.running:
            keep.users += 1
            self._background.start(self._keep, keep, reopen.arrived)
        return True

    def _expect(self, thread: int, path: str, slot: int) -> _Reopen:
        reopen = self._expected[thread, path] = _Reopen(trio.current_time(), slot, 0, trio.Event())
        return reopen

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

    async def _keep(self, blob: Blob, arrived: trio.Event) -> None:
        try:
            with trio.move_on_after(KEPT_FOR_S):
                await arrived.wait()
        finally:
            self._release(blob)

    def expected(self, thread: int, path: str) -> bool:
        """Whether an open of this path by this thread is a reopen."""
        return (thread, path) in self._expected

    @contextmanager
    def under_way(self, thread: int, path: str) -> Iterator[None]:
        """The length of an open, however long it takes: if it is a reopen, it stays expected."""
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
                del self._expected[thread, path]  # it becomes the youngest
                reopen.since = trio.current_time()
                self._expected[thread, path] = reopen

    def arrived(self, thread: int, path: str) -> bool:
        """An open is about to be answered with a handle; whether it is a reopen, which ends with `completed`."""
        reopen = self._expected.get((thread, path))
        if reopen is None:
            return False
        reopen.arrived.set()
        return True

    def completed(self, thread: int, path: str) -> None:
        """The kernel has got the handle of a reopen: the next open by the thread is an open of its own."""
        reopen = self._expected.pop((thread, path), None)
        if reopen is not None:
            self._ledger.set_count(reopen.slot, 0)
