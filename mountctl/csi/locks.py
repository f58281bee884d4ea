"""Locks by name, which are gone when nobody holds them."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from mountctl.csi.refusals import RefusedError


class Locks:
    """For each name, one holder at a time."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: set[str] = set()

    @contextmanager
    def held(self, *names: str, timeout_s: float) -> Iterator[None]:
        """Hold all of the names. Raises RefusedError (ABORTED) when one of them is held for longer than that."""
        wanted = set(names)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._busy & wanted, timeout_s):
                raise RefusedError(
                    grpc.StatusCode.ABORTED, f"{names[0]}: an earlier call for it is under way: try again later"
                )
            self._busy |= wanted
        try:
            yield
        finally:
            with self._changed:
                self._busy -= wanted
                self._changed.notify_all()
