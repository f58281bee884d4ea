"""Fork servers: who may ask them, how many there are, and when they end."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import chdir
from pathlib import Path

import pytest

from tests.support.fork_servers import ForkServers, fork_servers
from tests.support.mounts import wait_until
from trimsfs.extras.spawn import servers as registry
from trimsfs.extras.spawn.servers import DIRECTORY

ONE = (sys.executable, "-c", "print(1)")


def test_servers_are_listed_and_ended(servers: ForkServers) -> None:
    servers.run(*ONE)
    servers.run(sys.executable, "-c", "print(2)")
    pids = servers.pids()
    listed = [line.split()[0] for line in servers.command("--list").stdout.splitlines()]
    assert (listed[0], sorted(listed[1:])) == ("pid", sorted(map(str, pids)))
    assert servers.command("--stop", str(pids[0])).returncode == 0
    wait_until(lambda: servers.pids() == pids[1:])
    assert servers.command("--stop", "1").stderr == (
        "trimsfs: pid 1 is no fork server of yours: see trimsfs spawn --list\n"
    )
    assert servers.command("--stop").returncode == 0
    wait_until(lambda: servers.pids() == [])
    assert len(servers.command("--list").stdout.splitlines()) == 1


def test_a_server_that_imports_is_listed_by_its_own_pid(servers: ForkServers, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(f"import time; open({str(tmp_path / 'begun')!r}, 'w'); time.sleep(3)")
    script = tmp_path / "program.py"
    script.write_text("import os; print(os.getppid())")
    line = servers.line(sys.executable, script, options=("--preload", "slow"))
    with subprocess.Popen(line, stdout=subprocess.PIPE, env=servers.environment, text=True) as caller:
        wait_until((tmp_path / "begun").exists)
        (pid,) = servers.pids()
        assert caller.stdout is not None
        assert int(caller.stdout.read()) == pid


def test_programs_go_on_when_their_server_is_told_to_end(servers: ForkServers) -> None:
    caller = servers.start(
        sys.executable, "-c", "print('begun', flush=True); input(); print('ended')", stdin=subprocess.PIPE
    )
    assert caller.stdout is not None
    caller.stdout.readline()
    servers.command("--stop")
    assert caller.communicate("x\n", timeout=60) == ("ended\n", "")
    assert caller.returncode == 0


def test_many_callers_at_once_start_one_server(servers: ForkServers) -> None:
    outcomes: list[tuple[str, str]] = []

    def call() -> None:
        done = servers.run(*ONE)
        outcomes.append((done.stdout, done.stderr))

    threads = [threading.Thread(target=call) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [("1\n", "")] * 12
    assert len(servers.pids()) == 1


def test_idle_servers_make_room(servers: ForkServers) -> None:
    for number in range(registry.MOST_SERVERS + 2):
        assert servers.run(sys.executable, "-c", f"print({number})").stderr == ""
    assert len(servers.pids()) == registry.MOST_SERVERS


def test_servers_that_run_programs_do_not(servers: ForkServers) -> None:
    callers = []
    for number in range(registry.MOST_SERVERS):
        caller = servers.start(sys.executable, "-c", f"print({number}, flush=True); input()", stdin=subprocess.PIPE)
        assert caller.stdout is not None
        caller.stdout.readline()
        callers.append(caller)
    done = servers.run(*ONE)
    assert (done.stdout, done.stderr) == (
        "1\n",
        f"trimsfs: not forked: {registry.MOST_SERVERS} fork servers run programs already, and there may be no more\n",
    )
    for caller in callers:
        caller.communicate("x\n", timeout=60)


@pytest.mark.parametrize("limit", [0.0, 1.0])
def test_idle_servers_make_room_where_they_have_too_much_memory(
    servers: ForkServers, monkeypatch: pytest.MonkeyPatch, limit: float
) -> None:
    """One that runs a program stays."""
    monkeypatch.setattr(registry, "MOST_MEMORY", limit)
    servers.run(*ONE)
    (idle,) = servers.pids()
    caller = servers.start(sys.executable, "-c", "print(2, flush=True); input()", stdin=subprocess.PIPE)
    assert caller.stdout is not None
    caller.stdout.readline()
    (busy,) = set(servers.pids()) - {idle}
    settings = {"title": "", "preload": [], "directory": "", "models": [], "idle_s": 60.0, "joining": None}
    settings["learned"] = str(servers.place / "learned")
    servers.directory.start("0" * 32, [sys.executable], servers.environment, settings)
    wait_until(lambda: servers.pids().count(idle) == (limit > 0))
    assert busy in servers.pids()
    assert len(servers.pids()) == 2 + (limit > 0)
    caller.communicate("x\n", timeout=60)


def test_another_user_is_refused(servers: ForkServers) -> None:
    servers.run(*ONE)
    (path,) = (servers.place / "sockets").glob("*.socket")
    (servers.place / "sockets").chmod(0o755)
    for parent in path.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 1:
            parent.chmod(0o755)
    ask = (
        f"import os, socket; os.chdir({str(path.parent)!r}); s = socket.socket(socket.AF_UNIX); "
        f"s.connect({path.name!r}); print(s.recv(1))"
    )
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", ask],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PermissionError" in done.stderr
    path.chmod(0o777)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3", "-c", ask],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "b''\n"
    wait_until(lambda: "uid 65534 is refused" in servers.logs())


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_may_write_is_refused(servers: ForkServers, mode: int) -> None:
    place = servers.place / "sockets"
    place.mkdir()
    place.chmod(mode)
    done = servers.run(*ONE)
    assert (done.stdout, done.stderr) == (
        "1\n",
        f"trimsfs: not forked: {place} is not a directory that only you can write: set {DIRECTORY} to one\n",
    )


def test_rubbish_on_the_socket_ends_nothing(servers: ForkServers) -> None:
    servers.run(*ONE)
    (path,) = (servers.place / "sockets").glob("*.socket")
    for rubbish in (b"\0" * 100, os.urandom(1000), b"\0\0\0\2\0\0\0\0{}", b"\0\0\0\2\0\0\0\0[]", b"\xff" * 9):
        with socket.socket(socket.AF_UNIX) as channel:
            with chdir(path.parent):
                channel.connect(path.name)
            channel.sendall(rubbish)
    assert servers.run(*ONE).stderr == ""
    assert len(servers.pids()) == 1


def test_a_server_that_ended_leaves_no_obstacle(servers: ForkServers) -> None:
    servers.run(*ONE)
    for pid in servers.pids():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: servers.pids() == [])
    assert servers.run(*ONE).stdout == "1\n"


def test_a_server_that_cannot_start_is_named_with_its_log(servers: ForkServers, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nif 'fork_server' in sys.orig_argv[1]: raise SystemExit(3)")
    done = servers.run(*ONE, environment={"PYTHONPATH": str(tmp_path)})
    assert done.stdout == "1\n"
    assert done.stderr.startswith("trimsfs: not forked: the fork server ends when it starts: see ")


def test_a_long_path_of_the_sockets_works(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 120)
    with fork_servers(place) as servers:
        assert servers.run(*ONE).stderr == ""
        assert len(servers.pids()) == 1


def test_nothing_of_one_program_is_in_the_memory_of_another(servers: ForkServers) -> None:
    secret = "a-word-that-only-one-program-has"
    options, more = ("--vary", "SECRET"), {"SECRET": secret}
    text = "import os, sys; print(os.getpid(), flush=True); sys.stdin.read()"
    script = servers.place / "program.py"
    script.write_text(text)
    for _ in range(3):
        assert servers.run(sys.executable, script, secret, options=options, environment=more, input="").returncode == 0
    line = servers.line(sys.executable, script, options=options)
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=servers.environment) as caller:
        assert caller.stdout is not None
        other = int(caller.stdout.readline())
        assert not any(_has(pid, secret) for pid in (other, *servers.pids()))
        caller.communicate()
    line = servers.line(sys.executable, script, secret, options=options)
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=servers.environment | more) as caller:
        assert caller.stdout is not None
        assert _has(int(caller.stdout.readline()), secret)
        caller.communicate()


def _has(pid: int, word: str) -> bool:
    """Whether a process has a word somewhere in memory that it can write."""
    with Path(f"/proc/{pid}/maps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in maps:
            where, mode, *_ = line.split()
            if mode.startswith("rw"):
                start, end = (int(address, 16) for address in where.split("-"))
                memory.seek(start)
                if word.encode() in (memory.read(end - start) or b""):
                    return True
    return False
