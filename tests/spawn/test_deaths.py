"""Signals reach the program, and whatever ends, nothing is left: no process, and no caller that waits."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.fork_servers import ForkServers
from tests.support.mounts import wait_until

SLEEPER = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture
def sleeper(servers: ForkServers) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """A caller, and the program that was forked for it."""
    caller = servers.start(sys.executable, "-c", SLEEPER, start_new_session=True)
    assert caller.stdout is not None
    pid = int(caller.stdout.readline())
    try:
        yield caller, pid
    finally:
        for each in (caller.pid, pid):
            with suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        caller.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGRTMIN, signal.SIGIO])
def test_a_signal_ends_the_program_and_its_caller(
    sleeper: tuple["subprocess.Popen[str]", int], number: signal.Signals
) -> None:
    caller, pid = sleeper
    caller.send_signal(number)
    assert caller.wait(60) == -number
    assert not _runs(pid)


def test_an_interrupt_is_the_programs_exception(sleeper: tuple["subprocess.Popen[str]", int]) -> None:
    caller, _ = sleeper
    caller.send_signal(signal.SIGINT)
    assert caller.wait(60) == -signal.SIGINT
    assert caller.stderr is not None
    assert caller.stderr.read().endswith("KeyboardInterrupt\n")


def test_a_handler_of_the_program_runs(servers: ForkServers) -> None:
    program = (
        "import signal, time, os\n"
        "signal.signal(signal.SIGTERM, lambda *a: (print('handled', flush=True), os._exit(9)))\n"
        "print('ready', flush=True)\ntime.sleep(100)"
    )
    caller = servers.start(sys.executable, "-c", program)
    assert caller.stdout is not None
    caller.stdout.readline()
    caller.terminate()
    assert caller.communicate(timeout=60) == ("handled\n", "")
    assert caller.returncode == 9


def test_a_killed_caller_takes_the_program_with_it(sleeper: tuple["subprocess.Popen[str]", int]) -> None:
    caller, pid = sleeper
    caller.kill()
    caller.wait(60)
    wait_until(lambda: not _runs(pid))


def test_a_killed_program_ends_its_caller_likewise(sleeper: tuple["subprocess.Popen[str]", int]) -> None:
    caller, pid = sleeper
    os.kill(pid, signal.SIGKILL)
    assert caller.wait(60) == -signal.SIGKILL


def test_a_killed_server_takes_its_programs_with_it_and_the_next_call_starts_another(
    servers: ForkServers, sleeper: tuple["subprocess.Popen[str]", int]
) -> None:
    caller, pid = sleeper
    (server,) = servers.pids()
    os.kill(server, signal.SIGKILL)
    assert caller.wait(60) == -signal.SIGKILL
    assert caller.stderr is not None
    assert caller.stderr.read() == "trimsfs: the fork server has ended, and the program with it\n"
    wait_until(lambda: not _runs(pid))
    assert servers.run(sys.executable, "-c", "print(1)").stdout == "1\n"
    assert server not in servers.pids()


def test_a_program_that_stops_stops_its_caller_and_goes_on_with_it(
    sleeper: tuple["subprocess.Popen[str]", int],
) -> None:
    caller, pid = sleeper
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _state(caller.pid) == "T")
    caller.send_signal(signal.SIGCONT)
    wait_until(lambda: _state(pid) == "S")
    caller.terminate()
    assert caller.wait(60) == -signal.SIGTERM


def test_a_caller_goes_on_with_a_program_that_somebody_else_rouses(
    sleeper: tuple["subprocess.Popen[str]", int],
) -> None:
    caller, pid = sleeper
    for _ in range(3):
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: _state(caller.pid) == "T")
        os.kill(pid, signal.SIGCONT)
        wait_until(lambda: _state(caller.pid) == _state(pid) == "S")
    caller.terminate()
    assert caller.wait(60) == -signal.SIGTERM


def test_a_program_hears_once_that_it_goes_on(servers: ForkServers) -> None:
    program = (
        "import os, signal\nsignal.signal(signal.SIGCONT, lambda *a: print('goes on', flush=True))\n"
        "print(os.getpid(), flush=True)\ninput()"
    )
    caller = servers.start(sys.executable, "-c", program, stdin=subprocess.PIPE)
    assert caller.stdout is not None
    pid = int(caller.stdout.readline())
    for roused in (pid, caller.pid, pid):
        os.kill(pid, signal.SIGSTOP)
        wait_until(lambda: _state(caller.pid) == "T")
        os.kill(roused, signal.SIGCONT)
        wait_until(lambda: _state(caller.pid) == _state(pid) == "S")
    assert caller.communicate("\n", timeout=60) == ("goes on\n" * 3, "")


def test_a_stopped_program_that_is_killed_ends_its_caller(sleeper: tuple["subprocess.Popen[str]", int]) -> None:
    caller, pid = sleeper
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _state(caller.pid) == "T")
    os.kill(pid, signal.SIGKILL)
    assert caller.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)])
def test_keys_of_a_terminal_reach_the_program_and_what_it_started(
    servers: ForkServers, key: bytes, number: signal.Signals
) -> None:
    program = (
        "import os, subprocess, sys, resource, signal\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "child = subprocess.Popen(['sleep', '100'])\n"
        "print(os.getpid(), child.pid, sys.stdin.isatty(), flush=True)\n"
        "child.wait(); signal.pause()"
    )
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(servers.line("x")[0], servers.line(sys.executable, "-c", program), servers.environment)
    try:
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(terminal, 1000)
        program_pid, child, is_terminal = line.split()
        assert is_terminal == b"True"
        os.write(terminal, key)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == number
        wait_until(lambda: not _runs(int(program_pid)) and not _runs(int(child)))
    finally:
        os.close(terminal)


def test_a_server_that_is_stopped_keeps_nobody_waiting(servers: ForkServers) -> None:
    servers.run(sys.executable, "-c", "print(1)")
    (server,) = servers.pids()
    os.kill(server, signal.SIGSTOP)
    done = servers.run(sys.executable, "-c", "print(1)")
    assert (done.returncode, done.stdout) == (0, "1\n")
    assert done.stderr == f"trimsfs: not forked: the fork server, pid {server}, is stopped\n"
    os.kill(server, signal.SIGCONT)
    time.sleep(0.2)
    wait_until(lambda: len(servers.facts()) == 1)
    assert servers.run(sys.executable, "-c", "print(1)").stderr == ""


def test_output_ends_with_the_program(servers: ForkServers) -> None:
    program = "import os; os.close(1); os.close(2); import time; time.sleep(0.5)"
    caller = servers.start(sys.executable, "-c", program)
    assert caller.stdout is not None
    assert caller.stdout.read() == ""  # although the caller runs on
    assert caller.poll() is None
    assert caller.communicate(timeout=60) == ("", "")
    assert caller.returncode == 0


def test_a_daemon_outlives_its_program(servers: ForkServers, tmp_path: Path) -> None:
    program = f"import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(1); open({str(tmp_path / 'x')!r}, 'w')"
    assert servers.run(sys.executable, "-c", program, capture_output=False).returncode == 0
    assert not (tmp_path / "x").exists()
    wait_until((tmp_path / "x").exists)
    assert servers.facts()[0]["running"] == 0


def test_processes_that_a_program_forks_end_as_it_does_at_the_same_time(servers: ForkServers, tmp_path: Path) -> None:
    """All of them would tell the server what they have imported."""
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys, unittest.mock, sqlite3, email.message\n"
        "for _ in range(5):\n    os.fork()\nsys.stdout.write('x\\n')"
    )
    for _ in range(3):
        done = servers.run(sys.executable, script, environment={"XDG_CACHE_HOME": "/dev/null"})
        assert (done.returncode, done.stdout, done.stderr) == (0, "x\n" * 32, "")


def test_what_a_program_writes_to_its_server_ends_no_server(servers: ForkServers) -> None:
    program = (
        "import os, sys\n"
        "for number in map(int, os.listdir('/proc/self/fd')):\n"
        "    if number >= 64 and os.readlink(f'/proc/self/fd/{number}').startswith('socket'):\n"
        "        print(os.write(number, b'\\xff' * 100))"
    )
    done = servers.run(sys.executable, "-c", program)
    assert (done.stdout, done.stderr) == ("100\n", "")
    (before,) = servers.pids()
    assert servers.run(sys.executable, "-c", program).stdout == "100\n"
    assert servers.pids() == [before]


def test_a_full_disk_and_a_closed_pipe_are_the_programs(servers: ForkServers) -> None:
    program = "print('x' * 100000)"
    shell = '"$@" | true; echo ${PIPESTATUS[0]}; "$@" > /dev/full; echo $?'
    outcomes = []
    for line in ([sys.executable, "-c", program], servers.line(sys.executable, "-c", program)):
        done = subprocess.run(
            ["bash", "-c", shell, "bash", *line],
            env=servers.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        outcomes.append((done.stdout.split()[-1], sorted(done.stderr.splitlines())[-3:]))
    assert outcomes[1] == outcomes[0]
