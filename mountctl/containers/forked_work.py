"""Runs work that may hang, or that enters other namespaces, in a child process with a deadline."""

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from trimsfs.polling import readable

TIMEOUT_S = 10.0
LIMIT = 16 << 20
"""The most bytes of a result."""


class OverdueError(Exception):
    """Work has not ended at its deadline, or its result is too long."""


class RefusalError(Exception):
    """Work failed: the step, and the errno value of the failed system call, or 0 if none failed."""

    def __init__(self, step: str, number: int = 0) -> None:
        super().__init__(step, number)
        self.step = step
        self.number = number


def run_in_child(work: Callable[[], bytes], timeout_s: float = TIMEOUT_S) -> bytes:
    """Run *work* in a child process; returns its result. Raises its RefusalError, and OverdueError at the deadline."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _work(work, sender, timeout_s)
    os.close(sender)
    try:
        answer = _read(receiver, time.monotonic() + timeout_s)
    except OverdueError:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(receiver)
        _reap(child)
    kind, _, rest = answer.partition(b"\0")
    if kind == b"done":
        return rest
    step, _, number = rest.decode().partition(" ")
    raise RefusalError(step or "unexpected", int(number or 0))


def _work(work: Callable[[], bytes], sender: int, timeout_s: float) -> NoReturn:
    # The work may enter a hostile container's root directory, so the child must import nothing from there. Messages may
    # load modules and parts of the C library, so the parent writes them: the child sends only a step and a number.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)
    sys.meta_path.clear()
    try:
        answer = b"done\0" + work()
    except RefusalError as refusal:
        answer = b"refused\0%s %d" % (refusal.step.encode(), refusal.number)
    except OSError as error:
        answer = b"refused\0unexpected %d" % (error.errno or errno.EIO)
    except BaseException:  # report every failure to the parent
        answer = b"refused\0unexpected 0"
    with contextlib.suppress(OSError):
        rest = memoryview(answer)
        while rest:
            rest = rest[os.write(sender, rest) :]
    os._exit(0)


def _read(receiver: int, deadline: float) -> bytes:
    answer = bytearray()
    while len(answer) <= LIMIT:
        if not readable([receiver], deadline - time.monotonic()):
            raise OverdueError("no answer in time")
        part = os.read(receiver, 1 << 16)
        if not part:
            return bytes(answer)
        answer += part
    raise OverdueError("the answer is too long")


def _reap(child: int) -> None:
    """Reap the child; give up after 1 s, as it may hang in the kernel."""
    deadline = time.monotonic() + 1
    while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)
