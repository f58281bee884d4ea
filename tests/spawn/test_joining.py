"""Forks of a server at a socket become what their callers are: in namespaces, with less privileges, in other groups."""

import os
import shutil
import signal
import socket
import struct
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.control_groups import control_groups
from tests.support.fork_servers import TIMEOUT_S, own_environment
from tests.support.mount_namespace import own_mounts
from tests.support.mounts import let_in, wait_until
from tests.support.processes import alive, family
from tests.support.socket_servers import PYTHON, SELF, USER, ServerAtSocket, serving
from trimsfs.extras.spawn.messages import Receiver, send
from trimsfs.extras.spawn.servers import ask

ALONE = ["unshare", "--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup", "--fork", "--mount-proc", *own_mounts()]
INSIDE = "hostname inside; mount -t tmpfs none /mnt; touch /mnt/only-here; cd /mnt"
FILTER = """
import ctypes, os, struct, sys
code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 1, ctypes.addressof(code)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Starts a program with a seccomp filter that lets everything through."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerAtSocket]:
    """A server that allows nothing."""
    with serving(tmp_path) as started:
        yield started


@pytest.mark.parametrize(
    ("start", "before"),
    [
        pytest.param([], ":", id="the server's own"),
        pytest.param(ALONE, INSIDE, id="namespaces"),
        pytest.param(["unshare", "--user", "--map-root-user"], ":", id="user namespace"),
        pytest.param(["unshare", "--user", "--map-root-user", *ALONE[1:]], INSIDE, id="all namespaces"),
        pytest.param(["setpriv", "--no-new-privs", "--bounding-set=-sys_admin", "--inh-caps=-all"], ":", id="less"),
        pytest.param(USER, ":", id="another user"),
        pytest.param([*USER[:4], "--bounding-set=-all", "--no-new-privs"], ":", id="another user without any"),
        pytest.param([*ALONE, *USER], ":", id="another user in namespaces"),
        pytest.param(["prlimit", "--nofile=300:400", "--nproc=99", "--core=0", "--"], ":", id="limits"),
        pytest.param(["nice", "-n", "7", "choom", "-n", "300", "--"], ":", id="priorities"),
    ],
)
def test_a_fork_is_what_its_caller_is(server: ServerAtSocket, start: list[str], before: str) -> None:
    plain, forked, errors = server.both(SELF, *start, before=before)
    assert forked == plain
    assert not errors


def test_a_fork_is_in_the_control_group_of_its_caller(server: ServerAtSocket) -> None:
    group = control_groups() / f"trimsfs-tests-{uuid.uuid4().hex}"
    group.mkdir()
    try:
        plain, forked, errors = server.both(SELF, before=f"echo $$ > {group}/cgroup.procs")
        assert f"0::/{group.name}\n" in plain
        assert forked == plain
        assert not errors
        wait_until(lambda: not (group / "cgroup.procs").read_text())
    finally:
        group.rmdir()


def test_a_fork_is_below_the_root_of_its_caller(server: ServerAtSocket, tmp_path: Path) -> None:
    """The same files, but another root: as in a container of the same image."""
    root = tmp_path / "root"
    root.mkdir()
    start = [
        "unshare",
        "--mount",
        *own_mounts(),
        "sh",
        "-c",
        f'mount --rbind / {root}; cd {root}; exec chroot . "$@"',
        "sh",
    ]
    plain, forked, errors = server.both(SELF, *start, before="cd /usr")
    assert forked == plain
    assert not errors


def test_a_caller_with_filters_is_refused(server: ServerAtSocket) -> None:
    plain, forked, errors = server.both(SELF, PYTHON, "-c", FILTER)
    assert forked == plain  # as it is, with its filter
    assert errors == "trimsfs: not forked: a fork would have another seccomp than its caller\n"


def test_filters_are_the_same_where_the_operator_says_so(tmp_path: Path) -> None:
    start = [PYTHON, "-c", FILTER]
    with serving(tmp_path, start=start) as server:
        plain, forked, errors = server.both(SELF, *start)
        assert forked == plain
        assert errors.startswith("trimsfs: not forked: its process has seccomp filters: ")
    with serving(tmp_path, "--allow=seccomp", start=start) as server:
        plain, forked, errors = server.both(SELF, *start)
        assert forked == plain
        assert not errors


def test_variables_that_differ_are_named(tmp_path: Path) -> None:
    text = "import os; print(os.environ['COLOUR'], os.environ['HOSTNAME'])"
    with serving(tmp_path) as server:
        plain, forked, errors = server.both(text, "env", "COLOUR=red", "HOSTNAME=x", "SIZE=3")
        assert plain == forked == "red x\n"
        refusal = "variables differ from the fork server's: give that --vary COLOUR,SIZE"
        assert errors == f"trimsfs: not forked: {refusal}\n"
    with serving(tmp_path, "--vary=COL*") as server:
        plain, forked, errors = server.both(text, "env", "COLOUR=red", "HOSTNAME=x")
        assert plain == forked == "red x\n"
        assert not errors


def test_a_caller_that_has_another_file_of_a_module_is_refused(tmp_path: Path) -> None:
    """Its container has another version of the library than the fork server's."""
    (tmp_path / "libraries").mkdir()
    module, other = tmp_path / "libraries/library.py", tmp_path / "other.py"
    module.write_text("VERSION = 1")
    other.write_text("VERSION = 22")
    let_in(tmp_path / "libraries")
    start = ["env", f"PYTHONPATH={module.parent}"]
    with serving(tmp_path, preload="library", start=start) as server:
        alone = [*start, "unshare", "--mount"]
        text = "import library; print(library.VERSION)"
        plain, forked, errors = server.both(text, *alone, before=f"mount --bind {other} {module}")
        assert plain == forked == "22\n"
        assert errors == f"trimsfs: not forked: {module} is another file than the one that the fork server has\n"


def test_a_file_that_changes_makes_a_new_server_once_no_program_runs(tmp_path: Path) -> None:
    (tmp_path / "libraries").mkdir()
    module = tmp_path / "libraries/library.py"
    module.write_text("VERSION = 1")
    start = ["env", f"PYTHONPATH={module.parent}"]
    with serving(tmp_path, preload="library", start=start) as server:
        text = "import library; print(library.VERSION)"
        assert server.both(text, *start) == ("1\n", "1\n", "")
        long = [*start, *server.line("--socket", str(server.path), "--", PYTHON, "-c", "print(1, flush=True); input()")]
        with subprocess.Popen(
            long, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own_environment()
        ) as running:
            assert running.stdout is not None
            running.stdout.readline()
            module.write_text("VERSION = 22")
            plain, forked, errors = server.both(text, *start)
            assert plain == forked == "22\n"
            assert errors.startswith(f"trimsfs: not forked: {module} has changed since the fork server began")
            running.communicate("\n", timeout=TIMEOUT_S)
        assert server.both(text, *start) == ("22\n", "22\n", "")
        assert server.process.poll() is None


@pytest.mark.parametrize("start", [[], ALONE, [*ALONE, *USER]], ids=["", "namespaces", "another user"])
@pytest.mark.parametrize("who", ["the caller", "the fork server"])
def test_a_program_ends_with_its_caller_and_with_its_fork_server(
    server: ServerAtSocket, start: list[str], who: str
) -> None:
    text = "import os; print(os.getpid(), flush=True); os.read(0, 1)"
    line = [*start, *server.line("--socket", str(server.path), "--", PYTHON, "-c", text)]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, env=own_environment()) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline()
        _, program = family(server.process.pid)
        if who == "the caller":
            for pid in family(caller.pid):
                os.kill(pid, signal.SIGKILL)
        else:
            server.process.kill()
        wait_until(lambda: not alive(program))
        caller.wait(TIMEOUT_S)


def test_who_may_not_write_the_socket_gets_no_fork(server: ServerAtSocket) -> None:
    server.path.chmod(0o600)
    plain, forked, errors = server.both(SELF, *USER)
    assert forked == plain
    assert errors == f"trimsfs: not forked: no fork server listens at {server.path}, or not to this user\n"


def test_another_user_cannot_end_a_server(server: ServerAtSocket) -> None:
    command = [*USER, *server.line("--socket", str(server.path), "--stop")]
    subprocess.run(command, check=False, capture_output=True, timeout=TIMEOUT_S)
    assert ask(str(server.path), "tell") is not None


def test_a_caller_that_becomes_another_program_after_it_connected_gets_no_more_than_it_had(
    server: ServerAtSocket,
) -> None:
    """A setuid program runs in its process when the fork server looks, and somebody else sends the order."""
    proof = server.directory / "proof"
    powerful = server.directory / "sleep"
    shutil.copy("/usr/bin/sleep", powerful)
    powerful.chmod(0o4755)
    attack = f"""
import os, socket, sys, time
sys.path.insert(0, {str(server.directory / "site")!r})
from trimsfs.extras.spawn import caller
from trimsfs.extras.spawn.messages import Receiver, send
from trimsfs.extras.spawn.python_command import parse
channel = socket.socket(socket.AF_UNIX)
channel.connect({str(server.path)!r})
channel.set_inheritable(True)
if os.fork():
    os.execv({str(powerful)!r}, ["sleep", "5"])
time.sleep(1)
command = parse([{PYTHON!r}, "-c", "open({str(proof)!r}, 'w')"], os.environ)
order = caller.facts(command, os.environ, caller.Status()) | {{"directory": "/", "descriptors": [1]}}
receiver = Receiver(channel)
receiver.wait()
send(channel, {{"do": "run"}})
receiver.wait()
send(channel, order, [os.open("/", os.O_PATH), 1])
send(channel, {{"do": "go"}})
print(receiver.wait()[0], flush=True)
"""
    done = subprocess.run(
        [*USER, PYTHON, "-c", attack],
        env=own_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=True,
    )
    assert "'is': 'refused'" in done.stdout
    assert not proof.exists()


def test_what_follows_a_word_to_run_ends_no_server(server: ServerAtSocket) -> None:
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(TIMEOUT_S)
        channel.connect(str(server.path))
        receiver = Receiver(channel)
        receiver.wait()
        text = b'{"do": "run"}'
        channel.sendall(struct.pack("!II", len(text), 0) + text + b"\xff" * 100)
        with suppress(EOFError):
            while receiver.wait()[0]["is"] not in {"refused", "ended"}:
                pass
    assert ask(str(server.path), "tell") is not None


def test_descriptors_that_nobody_asked_for_are_not_taken(server: ServerAtSocket) -> None:
    before = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    with socket.socket(socket.AF_UNIX) as channel:
        channel.settimeout(TIMEOUT_S)
        channel.connect(str(server.path))
        Receiver(channel).wait()
        with suppress(ConnectionError):
            send(channel, {"do": "tell"}, [0] * 200)
            while channel.recv(4096):
                pass
    wait_until(lambda: len(os.listdir(f"/proc/{server.process.pid}/fd")) <= before)


def test_who_may_ask_writes_nothing_that_a_server_reads(server: ServerAtSocket) -> None:
    assert [path.name for path in server.path.parent.glob(f"{server.path.name}*")] == [server.path.name]


def test_a_server_in_the_background_of_a_shell_ignores_no_signal(tmp_path: Path) -> None:
    with serving(tmp_path, start=["sh", "-c", 'trap "" INT HUP QUIT; exec "$@"', "sh"]) as server:
        plain, forked, errors = server.both(SELF)
        assert forked == plain
        assert not errors


@pytest.mark.parametrize("start", [[], ALONE], ids=["", "namespaces"])
def test_a_thread_that_a_module_starts_later_is_found(tmp_path: Path, start: list[str]) -> None:
    (tmp_path / "libraries").mkdir()
    text = "import threading, time\n" + (
        "def later():\n    time.sleep(0.3)\n    threading.Thread(target=time.sleep, args=(99,), daemon=True).start()\n"
    )
    (tmp_path / "libraries/late.py").write_text(
        f"{text}import signal\nsignal.signal(signal.SIGALRM, lambda *_: later())\n"
    )
    variable = ["env", f"PYTHONPATH={tmp_path / 'libraries'}"]
    with serving(tmp_path, preload="late", start=variable) as server:
        os.kill(server.process.pid, signal.SIGALRM)
        wait_until(lambda: len(os.listdir(f"/proc/{server.process.pid}/task")) > 1)
        plain, forked, errors = server.both("print(1)", *variable, *start)
        assert plain == forked == "1\n"
        assert errors.startswith("trimsfs: not forked: the fork server has threads: ")


def test_messages_that_are_none_end_a_connection_and_no_server(server: ServerAtSocket) -> None:
    orders: list[dict[str, Any]] = [{}, {"environment": 3}, {"descriptors": [1 << 70]}]
    orders.append({"interpreter": [PYTHON], "environment": 3, "descriptors": []})
    wrong: list[list[dict[str, Any]]] = [[{}], *([{"do": "run"}, order] for order in orders)]
    for messages in wrong:
        channel = socket.socket(socket.AF_UNIX)
        channel.settimeout(TIMEOUT_S)
        channel.connect(str(server.path))
        receiver = Receiver(channel)
        for message in messages:
            receiver.wait()
            send(channel, message)
        with suppress(EOFError):
            assert receiver.wait()[0]["is"] == "refused"
        receiver.close()
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(server.path))
        channel.sendall(b"\xff" * 100)
        while channel.recv(4096):
            pass
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(server.path))
        channel.sendall(b"\0\1\0\0\0\0\0\0" + b"[" * (1 << 16))
        while channel.recv(4096):
            pass
    assert ask(str(server.path), "tell") is not None


def test_a_server_of_a_user_forks_for_that_user_alone(tmp_path: Path) -> None:
    let_in(tmp_path)
    with serving(tmp_path, start=USER) as server:
        rootless = [*USER, "unshare", "--user", "--map-root-user", *ALONE[1:]]
        for start, before in ((USER, ":"), (rootless, INSIDE)):
            plain, forked, errors = server.both(SELF, *start, before=before)
            assert forked == plain
            assert not errors
        plain, forked, errors = server.both(SELF)
        assert forked == plain
        assert errors.startswith("trimsfs: not forked: ")


def test_a_server_in_the_user_namespace_of_containers_joins_what_is_in_it(tmp_path: Path) -> None:
    """As `podman unshare` starts it, for containers without root."""
    let_in(tmp_path)
    with serving(tmp_path, start=[*USER, "unshare", "--user", "--map-root-user"]) as server:
        start = ["nsenter", f"--user=/proc/{server.process.pid}/ns/user", "--setuid=0", "--setgid=0", *ALONE]
        plain, forked, errors = server.both(SELF, *start, before=INSIDE)
        assert forked == plain
        assert not errors
