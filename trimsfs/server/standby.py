"""Standby: waits until the keeper promotes this process, which may then fork the next standby."""

import contextlib
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

from trimsfs.handover.keeper_client import Promotion, stand_by
from trimsfs.options import MountOptions
from trimsfs.server import sandbox


def await_turn(
    keeper_end: socket.socket, options: MountOptions, writable: Sequence[Path], *, forks: bool
) -> tuple[socket.socket, Promotion | None]:
    """Stand by until the keeper promotes this process, which may then fork the next standby, if it *forks*.

    Returns, in either process, its channel to the keeper and its promotion; None if the keeper dismisses it.
    """
    promotion = stand_by(keeper_end, forks=forks)
    if promotion is None or promotion.standby is None:
        return keeper_end, promotion
    with socket.socket(fileno=promotion.standby) as end:
        try:
            pid = os.fork()
        except OSError:
            pid = None  # the keeper sees the channel close, and starts a standby
        if pid != 0:
            if pid is not None:
                _reap(pid)
            if options.fence:
                sandbox.set_apart(writable)
            return keeper_end, promotion
        os.setsid()
        keeper_end.close()
        for descriptor in filter(None, (promotion.ledger, promotion.lock, promotion.fuse)):
            os.close(descriptor)
        return await_turn(end.dup(), options, writable, forks=False)


def _reap(standby: int) -> None:
    """Let the kernel forget a standby once it has ended: only the keeper wants to know.

    The signal is not ignored for that: of a helper for credentials, this process must learn whether it has failed.
    """

    def reap(*_: object) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(standby, os.WNOHANG)

    signal.signal(signal.SIGCHLD, reap)
    reap()
