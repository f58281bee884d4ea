"""Full disks, few descriptors, closed streams, files that change: programs run as they would, and servers go on."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fork_servers import ForkServers
from tests.support.mounts import wait_until
from tests.support.tmpfs import tmpfs
from trimsfs.extras.spawn.messages import PROTOCOL, send
from trimsfs.extras.spawn.python_command import PlainError
from trimsfs.extras.spawn.servers import DIRECTORY, short_path
from trimsfs.extras.spawn.session import LEAST_FILES, _Session

ONE = (sys.executable, "-c", "print(1)")
CHILDREN = "import os; print(open(f'/proc/self/task/{os.getpid()}/children').read())"
DESCRIPTORS = "import os; print(len([n for n in os.listdir('/proc/self/fd') if int(n) < 4096]))"
SIZE = 1 << 20


def _shell(servers: ForkServers, script: str, *words: str) -> "subprocess.CompletedProcess[str]":
    """Have a shell run a program in a fork."""
    line = ["bash", "-c", script, "bash", *servers.line(*words)]
    return subprocess.run(line, env=servers.environment, capture_output=True, text=True, timeout=60, check=False)


def _connected(servers: ForkServers) -> socket.socket:
    (path,) = (servers.place / "sockets").glob("*.socket")
    channel = socket.socket(socket.AF_UNIX)
    with short_path(str(path)) as address:
        channel.connect(address)
    return channel


def test_a_disk_that_becomes_full_ends_no_server(servers: ForkServers, tmp_path: Path) -> None:
    """What it has learned can be written nowhere, nor can a line in its log."""
    script = tmp_path / "program.py"
    script.write_text("import sys; print(len(sys.argv))\nif len(sys.argv) > 1: import tabnanny")
    with tmpfs(servers.place, SIZE):
        assert servers.run(sys.executable, script).stderr == ""
        before = servers.pids()
        with pytest.raises(OSError, match="No space left"):
            (servers.place / "filling").write_bytes(b"x" * 2 * SIZE)
        for words in (("x",), (), ("x", "x")):
            done = servers.run(sys.executable, script, *words)
            assert (done.stdout, done.stderr) == (f"{len(words) + 1}\n", "")
        assert before
        assert servers.pids() == before
        servers.command("--stop")
        wait_until(lambda: not servers.pids())


def test_no_server_starts_on_a_full_disk_and_no_file_is_left(servers: ForkServers, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "full", SIZE) as full:
        (full / "sockets").mkdir(mode=0o700)
        with pytest.raises(OSError, match="No space left"):
            (full / "filling").write_bytes(b"x" * 2 * SIZE)
        done = servers.run(*ONE, environment={DIRECTORY: str(full / "sockets")})
        assert (done.stdout, done.stderr) == (
            "1\n",
            "trimsfs: not forked: no fork server: [Errno 28] No space left on device\n",
        )
        assert [path.name for path in (full / "sockets").iterdir()] == ["lock"]


def test_a_program_runs_although_nobody_reads_why_it_is_not_forked(servers: ForkServers) -> None:
    done = _shell(servers, 'exec "$@" 2> /dev/full', sys.executable, "-X", "importtime", "-c", "print(3)")
    assert done.stdout == "3\n"


def test_a_caller_without_standard_streams_starts_a_server(servers: ForkServers, tmp_path: Path) -> None:
    program = f"import sys; print(sys.stdin, sys.stdout, sys.stderr, file=open({str(tmp_path / 'out')!r}, 'w'))"
    assert _shell(servers, 'exec "$@" <&- >&- 2>&-', sys.executable, "-c", program).returncode == 0
    assert (tmp_path / "out").read_text() == "None None None\n"
    assert len(servers.pids()) == 1


def test_a_program_that_is_not_forked_has_no_children_of_its_caller(servers: ForkServers, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nif 'fork_server' in sys.orig_argv[1]: raise SystemExit(3)")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = servers.run(sys.executable, "-c", CHILDREN, environment={"PYTHONPATH": path})
    assert "not forked" in done.stderr
    assert done.stdout == "\n"


def test_who_may_open_few_files_is_not_forked(servers: ForkServers) -> None:
    done = _shell(servers, 'ulimit -HSn 100; exec "$@"', *ONE)
    assert (done.stdout, done.stderr) == (
        "1\n",
        "trimsfs: not forked: it may open 100 files, and a fork has some from the beginning\n",
    )


def test_a_server_that_may_open_no_more_files_refuses_callers_and_goes_on(servers: ForkServers) -> None:
    few = f'ulimit -HSn {LEAST_FILES}; exec "$@"'
    assert _shell(servers, few, *ONE).stderr == ""
    before = servers.pids()
    channels = [_connected(servers) for _ in range(LEAST_FILES)]
    done = _shell(servers, few, *ONE)
    assert (done.stdout, done.stderr) == (
        "1\n",
        "trimsfs: not forked: the fork server cannot fork: Too many open files\n",
    )
    for channel in channels:
        channel.close()
    done = _shell(servers, few, *ONE)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert servers.pids() == before


def test_a_program_has_no_descriptor_of_another_caller(servers: ForkServers) -> None:
    """One whose order is not complete yet: nor do its descriptors take the numbers of another's."""
    line = (sys.executable, "-c", DESCRIPTORS)
    wanted = servers.run(*line).stdout
    with _connected(servers) as channel:
        channel.recv(100)
        null = os.open(os.devnull, os.O_RDONLY)
        channel.sendall(b"\0\0\0\x09\0\0\0\x40")
        socket.send_fds(channel, [b"\0"], [null] * 64)
        files = [os.dup(null) for _ in range(20)]
        try:
            assert servers.run(*line).stdout == wanted
            done = servers.run(*line, pass_fds=files)
            assert (int(done.stdout), done.stderr) == (int(wanted) + 20, "")
        finally:
            for file in [null, *files]:
                os.close(file)


def test_a_program_in_a_directory_that_is_gone_runs_as_it_is(servers: ForkServers, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    script = f'cd {tmp_path}/gone; rmdir {tmp_path}/gone; exec "$@"'
    done = _shell(servers, script, *ONE)
    assert (done.stdout, done.stderr) == (
        "1\n",
        "trimsfs: not forked: [Errno 2] No such file or directory\n",
    )


def test_a_module_that_changes_while_the_server_imports_is_imported_anew(servers: ForkServers, tmp_path: Path) -> None:
    module = tmp_path / "first.py"
    module.write_text("VERSION = 1")
    text = "VERSION = 22"
    changing = f"if open({str(module)!r}).read() != {text!r}: open({str(module)!r}, 'w').write({text!r})"
    (tmp_path / "second.py").write_text(changing)
    script = tmp_path / "program.py"
    script.write_text("import first; print(first.VERSION)")
    assert servers.run(sys.executable, script, options=("--preload", "first,second")).stdout == "22\n"


def test_a_server_that_ends_before_the_word_to_run_leaves_its_caller_as_it_was() -> None:
    ours, theirs = socket.socketpair()
    send(theirs, {"is": "here", "protocol": PROTOCOL})
    send(theirs, {"is": "ready", "notes": []})
    theirs.close()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert _Session({"do": "run"}).run(ours) is None
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_files_of_servers_that_have_ended_are_removed_and_no_others(servers: ForkServers) -> None:
    servers.run(*ONE)
    place = servers.place / "sockets"
    (place / f"{'0' * 32}.settings").touch()  # who was to start it has been killed
    (place / "notes.log").touch()
    for pid in servers.pids():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: servers.pids() == [])
    servers.command("--list")
    assert {path.name for path in place.iterdir()} == {"lock", "notes.log"}
    servers.run(*ONE)
    servers.command("--stop")
    assert {path.name for path in place.iterdir()} == {"lock", "notes.log"}


def test_files_of_a_server_that_starts_are_left(servers: ForkServers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens yet, but who starts it has the lock."""
    servers.run(*ONE)
    monkeypatch.setattr("trimsfs.extras.spawn.servers.LOCK_S", 0.1)
    directory = servers.directory
    starting = servers.place / "sockets" / f"{'0' * 32}.settings"
    with directory.locked():
        starting.touch()
        with pytest.raises(PlainError, match="lock is held"):
            directory.clean()
        assert starting.exists()
