"""What the log says of programs whose files cannot be completed."""

import os
import threading

import pytest
import trio
from trio.testing import MockClock

from trimsfs.errors import ObjectChangedError, StoreUnavailableError
from trimsfs.fuse.failed_reads import LOGGED_AGAIN_AFTER_S, FailedReads
from trimsfs.fuse.waiters import status_of

ERROR = StoreUnavailableError("a/b at 0: connection refused")


async def test_a_line_names_process_file_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    FailedReads().tell(threading.get_native_id(), "a/b", ERROR)
    name = status_of(os.getpid())["Name"]
    assert caplog.messages == [
        f"pid {os.getpid()} ({name}): a/b: the file cannot be completed: Input/output error: "
        "a/b at 0: connection refused (a read fails with EIO, a mapping with SIGBUS)"
    ]


async def test_a_program_is_told_of_each_file_once_in_a_while(
    caplog: pytest.LogCaptureFixture, autojump_clock: MockClock
) -> None:
    failed = FailedReads()
    for _ in range(100):
        failed.tell(os.getpid(), "a", ERROR)
    assert len(caplog.messages) == 1
    failed.tell(os.getpid(), "b", ObjectChangedError("b has been replaced"))
    failed.tell(os.getppid(), "a", ERROR)
    assert len(caplog.messages) == 3
    await trio.sleep(LOGGED_AGAIN_AFTER_S)
    failed.tell(os.getpid(), "a", ERROR)
    assert len(caplog.messages) == 4


async def test_who_is_unknown_is_told_as_such(caplog: pytest.LogCaptureFixture) -> None:
    failed = FailedReads()
    failed.tell(0, "a", ERROR)
    failed.tell(1 << 30, "a", ERROR)
    assert caplog.messages[0].startswith("a process of another PID namespace: a: ")
    assert caplog.messages[1].startswith(f"pid {1 << 30} (?): a: ")
