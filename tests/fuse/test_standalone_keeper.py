"""A mount whose keeper and servers are in namespaces of their own, as in containers: each may end, and be replaced."""

import errno
import json
import mmap
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median

import pytest

from mountctl.keeper.launching.launcher import CHECK_TIMEOUT_S
from mountctl.keeper.launching.launcher_socket import check
from mountctl.keeper.servers.forked_server import OtherProcess
from mountctl.linux import mounting
from mountctl.linux.sockets import launchers_path
from tests.services.fast import start_fast
from tests.support.control_groups import frozen
from tests.support.messages import JOIN
from tests.support.mounts import TRIMSFS, mountctl, trimsfs, wait_until
from tests.support.nodes import TIMEOUT_S, Node, a_node, end
from tests.support.processes import alive, family
from tests.support.service_manager import Manager
from tests.support.users import STRANGER, as_user
from trimsfs.fuse.waiters import CHECK_INTERVAL_S
from trimsfs.mountinfo import trimsfs_at
from trimsfs.processes import shown, title_of
from trimsfs.tiers.disk.lock import lock_holders

BOOTS = 7
KEEPER = """
import os, signal, sys
from pathlib import Path
from mountctl.keeper import limits
from mountctl.keeper.launching import standalone_keeper
from mountctl.keeper.keeper import Keeper
{}
sys.exit(standalone_keeper.hold(Path(sys.argv[1])))
"""
"""A keeper of which something is different."""
IMPATIENT = KEEPER.format("limits.VACANCY_LIMIT_S = 1")
SOON = KEEPER.format("limits.LEAVE_TIMEOUT_S = 1")
"""It soon takes the one before for one that hangs."""
IN_HASTE = KEEPER.format("standalone_keeper.KEPT_TIMEOUT_S = 0.2")
STOPPED_AT_THE_END = KEEPER.format("""
clean_up = Keeper._clean_up
def stopped_meanwhile(keeper):
    os.kill(os.getpid(), signal.SIGTERM)
    clean_up(keeper)
Keeper._clean_up = stopped_meanwhile
""")
BEFORE_LINUX_6_9 = KEEPER.format("""
on_ready = Keeper._on_ready
Keeper._on_ready = lambda keeper, server, *, resends: on_ready(keeper, server, resends=False)
""")
IMPATIENT_LAUNCHER = """
import json, sys
from mountctl.keeper.launching import launcher
launcher.KEEPER_TIMEOUT_S = 1
sys.exit(launcher.ServerLauncher(json.loads(sys.argv[1])).run())
"""
FILES = {"warm": random.Random(1).randbytes(9 << 20), "cold": random.Random(2).randbytes(5 << 20)}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with a_node(tmp_path, FILES) as node:
        yield node


@pytest.fixture
def served(node: Node) -> Node:
    """A node whose server serves."""
    node.keeper()
    node.server()
    node.serving()
    return node


def reading(path: Path) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["cat", path], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def told(process: "subprocess.Popen[bytes]") -> bytes:
    """What a reader has read; it meets no error."""
    output, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, errors) == (0, b"")
    return output


def await_line(node: Node, name: str, line: str) -> None:
    """Wait until keepers or servers have logged a line."""
    wait_until(lambda: line in node.log(name))


def device(node: Node) -> str:
    mount = trimsfs_at(node.mountpoint)
    assert mount is not None
    return mount.device


def test_readers_wait_for_the_next_container_of_a_server_that_is_lost(node: Node) -> None:
    node.keeper()
    container = node.server()  # in any order: it waits for the keeper, and the keeper for it
    before = node.serving()
    with (
        (node.mountpoint / "warm").open("rb", buffering=0) as file,
        closing(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)) as mapping,
    ):
        there, (killed, restarts) = device(node), (before, 0)
        for name in ("cold", "absent"):
            end(container)
            wait_until(lambda: node.facts()["state"] == "starting")
            assert mapping[:] == os.pread(file.fileno(), len(mapping), 0) == FILES["warm"]  # the kernel reads these
            reader = reading(node.mountpoint / name)
            time.sleep(0.3)
            assert reader.poll() is None
            assert node.check() == 0
            container = node.server()
            if name == "cold":
                assert told(reader) == FILES[name]
            else:
                assert b"No such file" in reader.communicate(timeout=TIMEOUT_S)[1]
            killed, restarts = node.serving(not_by=killed), restarts + 1
            assert int(str(node.facts()["restarts"])) >= restarts
            assert mapping[:] == FILES["warm"]
    assert device(node) == there
    assert trimsfs("status", node.mountpoint).returncode == 0


def test_a_newer_server_takes_over_while_the_one_before_is_there(served: Node) -> None:
    old, before = served.processes[-1], served.serving()
    with (served.mountpoint / "warm").open("rb", buffering=0) as file:
        new = served.server("fetch_processes=1")
        after = served.serving(not_by=before)
        assert old.poll() is None
        assert file.read() == FILES["warm"]
        end(old)
        assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]
        assert served.serving() == after
        # If the newer one is lost while the older is there, that serves again.
        served.server()
        latest = served.serving(not_by=after)
        end(served.processes[-1])
        served.serving(not_by=latest)
        assert new.poll() is None
        assert os.pread(file.fileno(), len(FILES["warm"]), 0) == FILES["warm"]


def test_a_crashed_server_is_followed_by_its_standby_in_the_same_container(served: Node) -> None:
    before = served.serving()
    wait_until(lambda: bool(served.facts()["standby"]))
    os.kill(before, signal.SIGKILL)
    served.serving(not_by=before)
    assert served.processes[-1].poll() is None
    assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]


def test_commands_say_that_such_a_mount_logs_to_no_file(served: Node) -> None:
    assert "log         to standard error of its" in trimsfs("status", served.mountpoint).stdout
    done = mountctl("logs", served.mountpoint)
    assert (done.returncode, "logs to standard error, not to a file" in done.stderr) == (13, True)


def test_the_log_of_the_launcher_tells_how_servers_have_ended(served: Node) -> None:
    for number in (signal.SIGSEGV, signal.SIGILL):  # of the first server, and of its fork
        before = served.serving()
        wait_until(lambda: bool(served.facts()["standby"]))
        os.kill(before, number)
        served.serving(not_by=before)
        await_line(served, "server", f"has ended: killed by {number.name}")
        assert f"server {before} has ended (only its parent knows how)" in served.log("keeper")


@pytest.mark.parametrize("way", ["stopped", "killed", "beside", "beside one that is halted", "beside one that hangs"])
def test_the_keeper_is_replaced_and_nothing_is_lost(served: Node, way: str) -> None:
    old, before, there = served.processes[0], served.serving(), device(served)
    with (
        (served.mountpoint / "warm").open("rb", buffering=0) as file,
        closing(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)) as mapping,
        ExitStack() as stack,
    ):
        if way == "stopped":
            old.send_signal(signal.SIGTERM)
        elif way == "killed":
            end(old)
        elif way == "beside one that is halted":
            old.send_signal(signal.SIGSTOP)
        elif way == "beside one that hangs":
            stack.enter_context(frozen(old.pid))
        if way in {"stopped", "killed"}:
            assert old.wait(TIMEOUT_S) == (0 if way == "stopped" else -signal.SIGKILL)
            assert served.check() == 10
            assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]  # the server serves on
            wait_until(lambda: trimsfs("status", served.mountpoint).returncode == 1)
            assert f"run `mountctl keeper {served.mountpoint}`" in trimsfs("status", served.mountpoint).stdout
        new = served.keeper(after=(sys.executable, "-c", SOON) if way == "beside one that hangs" else ())
        served.serving(not_by=before, keeper=new.pid)
        assert old.wait(TIMEOUT_S) == (0 if way in {"stopped", "beside"} else -signal.SIGKILL)
        assert device(served) == there
        assert mapping[:] == file.read() == FILES["warm"]
        assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]
    assert trimsfs("status", served.mountpoint).returncode == 0
    # All is as with the first: another server, and an orderly end.
    end(served.processes[1])
    served.server()
    assert told(reading(served.mountpoint / "cold")) == FILES["cold"]
    assert trimsfs("umount", served.mountpoint).returncode == 0
    assert served.processes[-1].wait(TIMEOUT_S) == 0
    assert served.check() == 0


def test_a_launcher_that_is_halted_is_told_while_its_server_serves_on(served: Node) -> None:
    (launcher,) = (pid for pid in family(served.processes[1].pid) if title_of(pid).startswith("trimsfs launcher"))
    os.kill(launcher, signal.SIGSTOP)
    try:
        told = f"the launcher, pid {launcher}, is stopped: no other server starts: run `kill -CONT {launcher}`"
        await_line(served, "keeper", told)
        assert told in mountctl("status", served.mountpoint).stdout
        assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]
    finally:
        os.kill(launcher, signal.SIGCONT)
    wait_until(lambda: told not in mountctl("status", served.mountpoint).stdout)
    assert served.log("keeper").count(told) == 1


def test_a_keeper_that_is_halted_is_no_keeper_to_launchers(served: Node) -> None:
    keeper, before = served.processes[0], served.serving()
    (launcher,) = (pid for pid in family(served.processes[1].pid) if title_of(pid).startswith("trimsfs launcher"))
    keeper.send_signal(signal.SIGSTOP)
    try:
        os.kill(launcher, signal.SIGTERM)
        time.sleep(CHECK_TIMEOUT_S + 1)
        assert alive(launcher)  # it alone keeps the mount
        assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]
    finally:
        keeper.send_signal(signal.SIGCONT)
    assert served.processes[1].wait(TIMEOUT_S) == 0
    served.server()
    served.serving(not_by=before)
    assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]


def test_a_launcher_tells_of_a_keeper_that_is_halted(node: Node) -> None:
    keeper = node.keeper()
    wait_until(lambda: node.check() == 0)
    keeper.send_signal(signal.SIGSTOP)
    order = {**JOIN, "mountpoint": str(node.mountpoint), "options": {"cache_dir": "/c", "log_file": "/l"}}
    command = [sys.executable, "-c", IMPATIENT_LAUNCHER, json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 10
    pid, path = keeper.pid, launchers_path(node.mountpoint)
    told = f"the keeper, pid {pid}, does not answer at {path}: run `kill -CONT {pid}`, or run `mountctl keeper "
    assert done.stderr == f"trimsfs: {told}{node.mountpoint}` again\n"


def test_a_keeper_that_is_stopped_without_a_server_leaves_once_the_next_one_serves(served: Node) -> None:
    old, there = served.processes[0], device(served)
    end(served.processes[1])
    wait_until(lambda: served.facts().get("state") != "serving")  # its servers end a little later
    old.send_signal(signal.SIGTERM)
    reader = reading(served.mountpoint / "cold")
    time.sleep(0.3)
    assert old.poll() is None
    served.server()
    assert told(reader) == FILES["cold"]
    assert old.wait(TIMEOUT_S) == 0
    served.serving(keeper=served.keeper().pid)
    assert device(served) == there


def test_a_keeper_that_is_stopped_before_the_first_server_just_ends(node: Node) -> None:
    keeper = node.keeper()
    wait_until(lambda: node.check() == 0)
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(TIMEOUT_S) == 0
    assert not launchers_path(node.mountpoint).exists()


@pytest.mark.parametrize("command", ["umount --lazy", "abort"])
def test_a_mount_that_ends_while_it_waits_for_a_server_is_mounted_anew_by_the_next(served: Node, command: str) -> None:
    end(served.processes[1])
    wait_until(lambda: served.facts().get("state") != "serving")
    aborts = command == "abort"
    done = mountctl(command, served.mountpoint) if aborts else trimsfs(*command.split(), served.mountpoint)
    assert done.returncode == 0, done.stderr
    wait_until(lambda: trimsfs_at(served.mountpoint) is None)
    served.server()
    served.serving()
    assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]


def test_a_launcher_lets_go_of_a_mount_that_has_ended_while_there_is_no_keeper(served: Node) -> None:
    keeper, _ = served.processes
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(TIMEOUT_S) == 0
    assert trimsfs("umount", served.mountpoint).returncode == 0
    cache = served.directory / "cache"
    wait_until(lambda: not lock_holders(cache), 10)
    served.serving(keeper=served.keeper().pid)
    assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]


def test_who_keeps_the_cache_of_a_server_that_has_ended_is_named(served: Node) -> None:
    keeper, launcher = served.processes
    keeper.send_signal(signal.SIGTERM)
    assert keeper.wait(TIMEOUT_S) == 0
    (holder,) = [pid for pid in family(launcher.pid) if title_of(pid).startswith("trimsfs launcher ")]
    os.kill(holder, signal.SIGSTOP)
    done = trimsfs("umount", served.mountpoint)
    assert done.returncode == 0, done.stderr
    cache = served.directory / "cache"
    done = trimsfs("mount", served.store, served.mountpoint, "--cache-dir", cache)
    told = (
        f"trimsfs: cache directory {cache} is in use by another server, pid unknown: unmount that, or set --cache-dir"
    )
    assert (done.returncode, done.stderr) == (8, f"{told}; {shown(holder)} holds its lock: end that\n")


def test_a_keeper_that_is_stopped_while_its_mount_ends_does_not_wait_for_the_next_server(node: Node) -> None:
    keeper = node.keeper(after=(sys.executable, "-c", STOPPED_AT_THE_END))
    node.server()
    node.serving()
    assert trimsfs("umount", node.mountpoint).returncode == 0
    assert keeper.wait(TIMEOUT_S) == 0


def test_after_both_have_ended_the_next_ones_mount_anew(served: Node) -> None:
    for process in served.processes:
        end(process)
    wait_until(lambda: mounting.answers(served.mountpoint, timeout_s=5) is False)
    with pytest.raises(OSError, match="not connected") as raised:
        os.listdir(served.mountpoint)
    assert raised.value.errno == errno.ENOTCONN
    served.server()
    served.serving(keeper=served.keeper().pid)
    assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]
    assert "detached the mount of a keeper and a server that have both ended" in served.log("keeper")


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why_and_leaves_the_mount_as_it_is(node: Node) -> None:
    node.keeper()
    assert node.server(store=node.directory / "nowhere").wait(TIMEOUT_S) == 5
    assert "does not exist" in node.log("server")
    assert trimsfs_at(node.mountpoint) is None
    node.server()
    before = node.serving()
    assert node.server("--server-user", "nobody-of-this-name").wait(TIMEOUT_S) == 2
    other = node.directory / "other"
    other.mkdir()
    assert node.server(store=other).wait(TIMEOUT_S) == 2
    remedy = "run `mountctl down` and start `trimsfs serve` again"
    assert f"store cannot be changed while it is mounted: {remedy}" in node.log("server")
    assert node.serving() == before
    end(node.processes[2])
    assert node.server("--server-user", "nobody-of-this-name").wait(TIMEOUT_S) == 2
    reader = reading(node.mountpoint / "cold")  # the mount waits for one that works
    node.server()
    assert told(reader) == FILES["cold"]


def test_a_mount_point_that_cannot_be_made_is_told_to_the_server_and_the_keeper_goes_on(node: Node) -> None:
    node.keeper()
    node.mountpoint.touch()
    assert node.server().wait(TIMEOUT_S) == 4
    assert f"trimsfs: {node.mountpoint}: File exists" in node.log("server")
    node.mountpoint.unlink()
    node.server()
    node.serving()
    assert (node.mountpoint / "cold").read_bytes() == FILES["cold"]


def test_a_keeper_that_cannot_listen_says_why_in_one_line(tmp_path: Path) -> None:
    launchers_path(tmp_path).mkdir(parents=True)
    try:
        done = mountctl("keeper", tmp_path)
    finally:
        launchers_path(tmp_path).rmdir()
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"no server can join the keeper of {tmp_path}: {launchers_path(tmp_path)}: Is a directory" in done.stderr


@pytest.mark.slow
def test_readers_get_an_error_when_no_server_comes(node: Node) -> None:
    node.keeper(after=(sys.executable, "-c", IMPATIENT))
    node.server()
    node.serving()
    end(node.processes[-1])
    reader = reading(node.mountpoint / "cold")
    _, errors = reader.communicate(timeout=TIMEOUT_S)
    assert reader.returncode == 1, errors
    assert "no server has come for 1 s: giving up" in node.log("keeper")
    node.server()
    node.serving()
    assert (node.mountpoint / "cold").read_bytes() == FILES["cold"]


@pytest.mark.slow
def test_a_reader_that_waits_for_long_is_not_taken_for_another_thread_of_the_servers(
    tmp_path: Path,
) -> None:
    """The kernel numbers it as in the keeper's PID namespace. In the server's there is no such thread."""
    bucket = tmp_path / "buckets/models"
    bucket.mkdir(parents=True)
    (bucket / "cold").write_bytes(FILES["cold"])
    with a_node(tmp_path, {}) as node, start_fast(tmp_path / "buckets", latency_ms=4000 * CHECK_INTERVAL_S) as server:
        node.keeper()
        node.server(store="s3://models", environment=server.environment())
        node.serving()
        reader = reading(node.mountpoint / "cold")
        assert told(reader) == FILES["cold"]
        facts = json.loads((node.mountpoint / ".trims/control").read_text())
        assert facts["server_pid"] == node.serving()
        assert facts["keeper_pid"] == node.processes[0].pid


def answer_to(node: Node, message: object, descriptors: Sequence[int] = ()) -> dict[str, str]:
    """What a keeper answers whoever connects, with descriptors, which are closed here."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as end:
        end.settimeout(20)
        end.connect(str(launchers_path(node.mountpoint)))
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        socket.send_fds(end, [data], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        answer: dict[str, str] = json.loads(end.recv(16384) or b"{}")
        return answer


def test_only_root_that_the_keeper_sees_may_serve(served: Node) -> None:
    path = launchers_path(served.mountpoint)
    assert (path.stat().st_mode & 0o777, path.stat().st_uid) == (0o600, 0)
    join = JOIN | {"mountpoint": str(served.mountpoint)}
    path.chmod(0o666)  # what if the socket's mode did not keep others out
    answer = as_user(STRANGER, lambda: answer_to(served, join))
    assert (answer["do"], answer["kind"]) == ("end", "NotPermittedError")
    assert f"uid {STRANGER} may not serve" in answer["error"]
    before = served.serving()
    for message in (
        b"\xff",
        b"[" * 9000,
        {},
        {"type": "join"},
        join | {"mountpoint": "/elsewhere"},
        join | {"names": ["fuse"]},
        join | {"cache_dir": None},
    ):
        assert answer_to(served, message)["kind"] == "TakeoverError", message
    assert served.serving() == before
    assert check(served.mountpoint, timeout_s=5)["protocol"] == 1


def test_a_mount_is_taken_from_nobody_who_shows_another(served: Node) -> None:
    server, launcher = served.serving(), served.processes[1].pid
    first = int(Path(f"/proc/{launcher}/task/{launcher}/children").read_text())
    join = JOIN | {"mountpoint": str(served.mountpoint), "names": ["fuse", "ledger", "lock", "server"]}
    os.kill(first, signal.SIGSTOP)  # it does not join before who pretends to be it
    end(served.processes[0])
    keeper = served.keeper()
    wait_until(lambda: served.check() == 0)
    bystander = subprocess.Popen(["sleep", "300"])
    shown = [os.open("/dev/fuse", os.O_RDWR), os.memfd_create("trimsfs-ledger"), os.open("/dev/null", os.O_RDONLY)]
    shown.append(os.pidfd_open(bystander.pid))
    answer = answer_to(served, join, shown)
    assert (answer["do"], answer["kind"]) == ("end", "TakeoverError")
    assert "is mounted, and not by this server" in answer["error"]
    assert bystander.poll() is None
    end(bystander)
    assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]
    os.kill(first, signal.SIGCONT)
    served.serving(not_by=server, keeper=keeper.pid)
    assert (served.mountpoint / "cold").read_bytes() == FILES["cold"]


def test_a_keeper_keeps_nothing_of_a_mount_that_another_one_keeps(served: Node) -> None:
    server, launcher = served.serving(), served.processes[1].pid
    first = OtherProcess(os.pidfd_open(int(Path(f"/proc/{launcher}/task/{launcher}/children").read_text())))
    numbers = {os.readlink(path): int(path.name) for path in Path(f"/proc/{first.pid}/fd").iterdir()}
    links = ["/dev/fuse", "/memfd:trimsfs-ledger (deleted)", f"{served.directory}/cache/lock", "anon_inode:[pidfd]"]
    kept = [first.descriptor(numbers[link]) for link in links]
    launchers_path(served.mountpoint).unlink()  # the next keeper does not ask this one
    keeper = served.keeper(after=(sys.executable, "-c", IN_HASTE))
    wait_until(lambda: served.check() == 0)
    before = len(os.listdir(f"/proc/{keeper.pid}/fd"))
    join = JOIN | {"mountpoint": str(served.mountpoint), "names": ["fuse", "ledger", "lock", "server"]}
    assert "is mounted, and not by this server" in answer_to(served, join, kept)["error"]
    wait_until(lambda: len(os.listdir(f"/proc/{keeper.pid}/fd")) == before)
    assert served.serving() == server


def test_a_keeper_that_does_not_see_its_servers_refuses_them(node: Node) -> None:
    node.keeper("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "shared")
    assert node.server().wait(TIMEOUT_S) == 1
    assert "run the keeper in the host's PID namespace (hostPID: true)" in node.log("server")


def test_a_launcher_that_may_not_end_its_servers_says_so(node: Node) -> None:
    node.keeper()
    launcher = node.server(host_pid=True, before=("setpriv", "--bounding-set", "-kill"))
    server = node.serving()
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(TIMEOUT_S) == 0
    assert "cannot end its servers, which are another user's: let the container have KILL" in node.log("server")
    assert "Traceback" not in node.log("server")
    os.kill(server, signal.SIGKILL)  # a container's runtime would


@pytest.mark.parametrize(("number", "older"), [(0, "server"), (2, "keeper")])
def test_versions_that_do_not_fit_are_told(served: Node, number: int, older: str) -> None:
    before = served.serving()
    answer = answer_to(served, {"type": "join", "protocol": number, "version": "9.9.9"})
    assert answer["kind"] == "TakeoverError"
    assert f"trimsfs 9.9.9 speaks protocol {number}, the keeper's trimsfs" in str(answer["error"])
    assert f"replace the {older}" in str(answer["error"])
    assert served.serving() == before


def test_operators_see_and_replace_the_server(served: Node) -> None:
    before = served.serving()
    done = mountctl("status", served.mountpoint)
    assert (done.returncode, f"server pid {before}" in done.stdout) == (0, True)
    done = mountctl("restart", served.mountpoint)
    assert done.returncode == 0, done.stderr
    assert served.serving() != before
    done = mountctl("recover", served.mountpoint)
    assert (done.returncode, "is alive" in done.stderr) == (1, True)
    end(served.processes[0])
    done = mountctl("recover", served.mountpoint)
    assert done.returncode == 1
    assert f"its keeper is `mountctl keeper {served.mountpoint}`: start that again" in done.stderr


def test_before_linux_6_9_a_server_is_ready_too_and_the_next_one_mounts_anew(node: Node) -> None:
    keeper = node.keeper(after=(sys.executable, "-c", BEFORE_LINUX_6_9))
    with closing(Manager(node.directory)) as manager:
        manager.start(TRIMSFS, "serve", str(node.store), str(node.mountpoint), "--cache-dir", f"{node.directory}/cache")
        manager.hear("READY=1")
        before = node.serving()
        os.kill(before, signal.SIGKILL)
        assert manager.process is not None
        assert manager.process.wait(TIMEOUT_S) == 1
    node.server()
    node.serving(keeper=keeper.pid)
    assert (node.mountpoint / "cold").read_bytes() == FILES["cold"]


@pytest.mark.slow
@pytest.mark.alone  # measures time
def test_a_node_serves_its_first_model_about_as_soon_as_a_mount_of_one_service(tmp_path: Path) -> None:
    """From nothing to the first bytes of a model in the cache: keeper and server start at once, in any order."""
    bucket = tmp_path / "buckets/models"
    bucket.mkdir(parents=True)
    (bucket / "cold").write_bytes(FILES["cold"])
    split, single = list[tuple[float, ...]](), list[float]()
    with a_node(tmp_path, {}) as node, start_fast(tmp_path / "buckets") as server:
        for _ in range(BOOTS + 1):
            began = time.monotonic()
            node.server(store="s3://models", environment=server.environment())
            node.keeper()
            listens = _seconds_until(began, launchers_path(node.mountpoint).exists)
            mounted = _seconds_until(began, lambda: trimsfs_at(node.mountpoint) is not None)
            assert (node.mountpoint / "cold").read_bytes() == FILES["cold"]
            split.append((listens, mounted, time.monotonic() - began))
            assert trimsfs("umount", node.mountpoint).returncode == 0
            for process in node.processes:
                end(process)
            launchers_path(node.mountpoint).unlink(missing_ok=True)
            began = time.monotonic()
            places = ("s3://models", node.mountpoint, "--cache-dir", node.directory / "cache")
            assert trimsfs("mount", *places, environment=server.environment()).returncode == 0
            assert (node.mountpoint / "cold").read_bytes() == FILES["cold"]
            single.append(time.monotonic() - began)
            assert trimsfs("umount", node.mountpoint).returncode == 0
    listens, mounted, served = (median(times) for times in zip(*split[1:], strict=True))  # the first one fetched
    print(f"\nkeeper listens after {listens:.2f} s, mounted after {mounted:.2f} s, first model after {served:.2f} s")
    print(f"`trimsfs mount` and the first model: {median(single[1:]):.2f} s (medians of {BOOTS} boots)")
    assert served < 2 * median(single[1:])


def _seconds_until(began: float, condition: Callable[[], bool]) -> float:
    while not condition():
        assert time.monotonic() - began < TIMEOUT_S
        time.sleep(0.002)
    return time.monotonic() - began
