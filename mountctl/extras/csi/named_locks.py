"""Locks by name, which exist only while a call holds them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from mountctl.extras.csi.status_errors import StatusError


class NamedLocks:
    """Mutual exclusion by name: one holder of a name at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: set[str] = set()

    @contextmanager
    def hold(self, *names: str, timeout_s: float) -> Iterator[None]:
        """Hold all names during the block. Raises StatusError (ABORTED) if another call holds one after *timeout_s*."""
        wanted = set(names)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._busy & wanted, timeout_s):
                raise StatusError(
                    grpc.StatusCode.ABORTED, f"{names[0]}: an earlier call for it still runs: try again later"
                )
            self._busy |= wanted
        try:
            yield
        finally:
            with self._changed:
                self._busy -= wanted
                self._changed.notify_all()
