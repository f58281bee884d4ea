"""How far a command has come, and the control file that tells it."""

import trio

from trimsfs.control.handle import as_json
from trimsfs.errors import InUseError, TrimsError
from trimsfs.tiers.blob import Blob

PROGRESS_INTERVAL_S = 0.25


class Progress:
    """How far a command has come: shared by the command, which writes, and its handle, which reads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.done_bytes = 0
        self.total_bytes = 0
        self.total_files = 0
        self.failed_files = 0
        self.left_out_files = 0
        self.unlocked_files = 0
        self._hindrance: str | None = None
        self.compared_copies = 0
        self.arriving: set[Blob] = set()
        self.finished = trio.Event()
        self.error: TrimsError | None = None

    def failed(self, error: TrimsError) -> None:
        """One file has failed; the first tells why."""
        self.failed_files += 1
        self.error = self.error or error

    def not_locked(self, hindrance: str) -> None:
        """One file is pinned and not locked in memory; the first tells what hinders it."""
        self.unlocked_files += 1
        self._hindrance = self._hindrance or hindrance

    def line(self) -> bytes:
        state = "running"
        if self.finished.is_set():
            state = "done" if self.error is None else "failed"
        line: dict[str, object] = {
            "path": self.path,
            "state": state,
            "done_bytes": self.done_bytes + sum(blob.verified_bytes for blob in self.arriving),
            "total_bytes": self.total_bytes,
            "total_files": self.total_files,
            "failed_files": self.failed_files,
            "left_out_files": self.left_out_files,
            "unlocked_files": self.unlocked_files,
            "unlocked": self._hindrance,
            "compared_copies": self.compared_copies,
        }
        if self.error is not None:
            line |= {"error": str(self.error), "kind": type(self.error).__name__}
        if isinstance(self.error, InUseError):
            line["in_use"] = self.error.key
        return as_json(line)


class RunningCommand:
    """A running command. Reads block for a moment at most, so a reader can always be interrupted."""

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
            self._text += self._progress.line()
        return self._text[offset : offset + size]

    def close(self) -> None:
        self._scope.cancel()
