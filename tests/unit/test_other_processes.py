"""A process that a keeper knows by its pidfd: what it takes for its end is its own."""

import os
import signal
import subprocess

import pytest

from mountctl.keeper.servers.forked_server import NOT_TOLD, ForkedServer, OtherProcess


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -SEGV $$", -signal.SIGSEGV)])
def test_the_exit_code_of_a_child_is_collected(command: str, code: int) -> None:
    child = subprocess.Popen(["sh", "-c", command])
    process = OtherProcess(os.pidfd_open(child.pid))
    assert process.wait(10) == process.returncode == code
    with pytest.raises(ChildProcessError):
        os.waitpid(child.pid, 0)
    child.returncode = code


def test_one_that_its_parent_has_collected_takes_no_other_child_for_itself() -> None:
    ended = subprocess.Popen(["true"])
    pidfd = os.pidfd_open(ended.pid)
    ended.wait(10)
    child = subprocess.Popen(["sh", "-c", "exit 3"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert OtherProcess(pidfd).poll() == -signal.SIGKILL
    assert child.wait(10) == 3


def test_a_server_that_still_ends_counts_as_killed() -> None:
    server = ForkedServer({})
    child = subprocess.Popen(["sleep", "60"])
    try:
        server._sent_by(os.pidfd_open(child.pid))
        assert server.end_reason() == "killed"
        child.kill()
        child.wait(10)
        assert server.end_reason() == NOT_TOLD  # this process has collected its code before
    finally:
        child.kill()
        server.channel.close()
        server.their_end.close()
