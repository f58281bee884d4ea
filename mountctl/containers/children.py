"""Work that may hang or that leaves the host's namespaces, in a process of its own and for a bounded time."""

import contextlib
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from mountctl.containers.errors import NoAnswerError

TIMEOUT_S = 10.0
LIMIT = 16 << 20
"""Most bytes of an answer."""


class RefusalError(Exception):
    """The work cannot be done: at which step, and the errno value if it was a system call that failed."""

    def __init__(self, step: str, number: int = 0) -> None:
        super().__init__(step, number)
        self.step = step
        self.number = number


def answer_of(work: Callable[[], bytes], timeout_s: float = TIMEOUT_S) -> bytes:
    """What *work* returns in a process of its own. Raises what it refuses with, and NoAnswerError."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        _work(work, sender, timeout_s)
    os.close(sender)
    try:
        answer = _read(receiver, time.monotonic() + timeout_s)
    except NoAnswerError:
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
    # The work may go to a file system that others fill. Nothing is to be imported from there: messages, with all that
    # they may need of modules and of the C library, are the parent's business, which hears of numbers only.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, timeout_s + 1)
    sys.meta_path.clear()
    try:
        answer = b"done\0" + work()
    except RefusalError as refusal:
        answer = b"refused\0%s %d" % (refusal.step.encode(), refusal.number)
    except OSError as error:
        answer = b"refused\0unexpected %d" % (error.errno or errno.EIO)
    except BaseException:  # the parent is to hear of it, whatever it is
        answer = b"refused\0unexpected 0"
    with contextlib.suppress(OSError):
        rest = memoryview(answer)
        while rest:
            rest = rest[os.write(sender, rest) :]
    os._exit(0)


def _read(receiver: int, deadline: float) -> bytes:
    answer = bytearray()
    while len(answer) <= LIMIT:
        ready, _, _ = select.select([receiver], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise NoAnswerError("no answer in time")
        part = os.read(receiver, 1 << 16)
        if not part:
            return bytes(answer)
        answer += part
    raise NoAnswerError("too long an answer")


def _reap(child: int) -> None:
    """Wait for a process, but not for one that the kernel holds."""
    deadline = time.monotonic() + 1
    while os.waitpid(child, os.WNOHANG) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.005)
