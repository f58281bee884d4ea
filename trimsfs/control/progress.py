"""The progress of a command, and the control file that reports it."""

from collections.abc import Callable

import trio

from trimsfs.control.handle import as_json
from trimsfs.errors import InUseError, TrimsError
from trimsfs.tiers.blob import Blob

PROGRESS_INTERVAL_S = 0.25


class Progress:
    """The progress of a command: the command writes it, its handle reads it.

    *outage* returns why the store does not answer, or None. A *patient* command waits for the store without a limit.
    """

    def __init__(self, path: str, outage: Callable[[], str | None] = lambda: None, *, patient: bool = False) -> None:
        self.path = path
        self.done_bytes = 0
        self.total_bytes = 0
        self.total_files = 0
        self.failed_files = 0
        self.left_out_files = 0
        self.absent_files = 0
        self.absent_bytes = 0
        self.unlocked_files = 0
        self._hindrance: str | None = None
        self.compared_copies = 0
        self.arriving: set[Blob] = set()
        self.interrupted: dict[str, int] = {}
        """By key, the verified bytes of files whose fetch an outage has interrupted."""
        self.finished = trio.Event()
        self.cancelled = False
        self.error: TrimsError | None = None
        self.failed_key: str | None = None
        """The key of the file that the error is of."""
        self.patient = patient
        self._outage = outage

    def failed(self, error: TrimsError, key: str | None = None) -> None:
        """Count a failed file, of this *key* if it is known; keep the first error."""
        self.failed_files += 1
        if self.error is None:
            self.error, self.failed_key = error, key

    def absent(self, size: int) -> None:
        """Count a file, of *size* bytes, that is not cached: the command has nothing to do."""
        self.absent_files += 1
        self.absent_bytes += size

    def not_locked(self, hindrance: str) -> None:
        """Count a file that is pinned but not locked in memory; keep the first reason."""
        self.unlocked_files += 1
        self._hindrance = self._hindrance or hindrance

    @property
    def waiting(self) -> str | None:
        """Why the command waits for the store; None if it does not."""
        if self.finished.is_set():
            return None
        wants = self.patient or not self.total_files or not all(blob.complete for blob in self.arriving)
        return self._outage() if wants else None

    def _state(self, waiting: str | None) -> str:
        if not self.finished.is_set():
            return "waiting" if self.patient and waiting is not None else "running"
        if self.cancelled:
            return "cancelled"
        return "done" if self.error is None else "failed"

    def facts(self) -> dict[str, object]:
        """The progress as control files report it."""
        waiting = self.waiting
        facts: dict[str, object] = {
            "path": self.path,
            "state": self._state(waiting),
            "done_bytes": self.done_bytes
            + sum(blob.verified_bytes for blob in self.arriving)
            + sum(self.interrupted.values()),
            "total_bytes": self.total_bytes,
            "total_files": self.total_files,
            "failed_files": self.failed_files,
            "left_out_files": self.left_out_files,
            "absent_files": self.absent_files,
            "absent_bytes": self.absent_bytes,
            "unlocked_files": self.unlocked_files,
            "unlocked": self._hindrance,
            "compared_copies": self.compared_copies,
            "waiting": waiting,
        }
        if self.error is not None:
            facts |= {"error": str(self.error), "kind": type(self.error).__name__, "failed": self.failed_key}
        if isinstance(self.error, InUseError):
            facts["in_use"] = self.error.key
        return facts


class RunningCommand:
    """The handle of a running command. Reads block only briefly, so that a reader can be interrupted."""

    def __init__(self, progress: Progress, scope: trio.CancelScope) -> None:
        self._progress = progress
        self._scope = scope
        self._text = b""
        self._last = False

    async def read(self, offset: int, size: int) -> bytes:
        if offset >= len(self._text) and not self._last:
            if self._text:
                with trio.move_on_after(PROGRESS_INTERVAL_S):
                    await self._progress.finished.wait()
            self._last = self._progress.finished.is_set()
            self._text += as_json(self._progress.facts())
        return self._text[offset : offset + size]

    def close(self) -> None:
        self._scope.cancel()
