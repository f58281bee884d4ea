"""Waiting for descriptors of any number."""

import fcntl
import os
import resource
import socket

import pytest

from trimsfs.polling import readable


@pytest.fixture
def high() -> int:
    """Above the numbers that select(2) takes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most <= 2000:
        pytest.skip("this user may have few descriptors")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(before[0], 2001), most))
    return 2000


def test_descriptors_of_any_number_are_waited_for(high: int) -> None:
    read, write = os.pipe()
    number = fcntl.fcntl(read, fcntl.F_DUPFD, high)
    try:
        assert readable([number], 0) == []
        os.write(write, b"x")
        assert readable([number], 5) == [number]
    finally:
        for each in (read, write, number):
            os.close(each)


def test_what_has_ended_can_be_read(high: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert readable([ours, theirs], 0) == []
        theirs.close()
        assert readable([ours], None) == [ours]
