"""What a user without rights gets of a mount's processes, of its files, and of what others have open."""

import ctypes
import os
import random
import signal
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mountctl.keeper.control_socket import ask
from mountctl.linux.mounting import CONNECTIONS
from mountctl.linux.sockets import socket_path
from tests.security.processes import processes
from tests.security.taken_over import attempted, called
from tests.support.mounts import MountedStore, log_beside, mounted, trimsfs, wait_until
from tests.support.processes import alive, family
from tests.support.survival import Survived
from tests.support.users import STRANGER, as_user
from trimsfs.mountinfo import mount_at

MIB = 1 << 20
CONTENT = random.Random(3).randbytes(3 * MIB)
GROUP = 2001
DENIED = {"EACCES", "EPERM"}
ENDED = {"ENOENT", "ESRCH"}
"""What comes of attempts at a process that has ended."""
_PTRACE_SEIZE, _PIDFD_OPEN, _PIDFD_GETFD, _KCMP = 0x4206, 434, 438, 312

_libc = ctypes.CDLL(None, use_errno=True)


def of_a_process(pid: int) -> dict[str, str]:
    room = ctypes.create_string_buffer(64)
    piece = (ctypes.c_void_p * 2)(ctypes.addressof(room), 64)
    found = {
        f"trace {pid}": called("ptrace", _PTRACE_SEIZE, pid, None, None),
        f"read its memory {pid}": called("process_vm_readv", pid, piece, 1, piece, 1, 0),
        f"compare with it {pid}": called("syscall", _KCMP, pid, os.getpid(), 0, 0, 0),
        f"raise its limits {pid}": called("prlimit", pid, 7, room, None),
        f"its descriptors {pid}": attempted(lambda: os.listdir(f"/proc/{pid}/fd")),
    }
    for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
        found[f"signal {number} {pid}"] = attempted(os.kill, pid, number)
    names = ("mem", "maps", "environ", "pagemap", "auxv", "stack", "syscall", "io", "map_files", "fd/0", "root", "cwd")
    for path in (f"/proc/{pid}/{name}" for name in names):
        found[path] = attempted(os.open, path, os.O_RDONLY)
    with suppress(ProcessLookupError):  # it has ended
        taken = os.pidfd_open(pid)
        for descriptor in range(8):
            found[f"take descriptor {descriptor} {pid}"] = called("syscall", _PIDFD_GETFD, taken, descriptor, 0)
        os.close(taken)
    return found


def of_the_mount(mount: MountedStore, log: Path, device: str) -> dict[str, str]:
    cache, found = mount.cache, {}
    files = (cache / "index.sqlite", cache / "lock", cache / "new", log, socket_path(mount.path))
    found["list the cache"] = attempted(os.listdir, cache)
    for path in files:
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_CREAT):
            found[f"{path} {flags}"] = attempted(os.open, path, flags)
        found[f"remove {path}"] = attempted(os.unlink, path)
    connection = CONNECTIONS / device.partition(":")[2]
    for name in ("abort", "max_background"):
        found[f"{connection / name}"] = attempted(os.open, connection / name, os.O_WRONLY)
    with socket.socket(socket.AF_UNIX) as end:
        found["ask the keeper"] = attempted(end.connect, str(socket_path(mount.path)))
    found["unmount"] = called("umount2", os.fsencode(mount.path), 2)
    found["mount over it"] = called("mount", b"none", os.fsencode(mount.path), b"tmpfs", 0, None)
    found["sockets of its own"] = attempted(os.open, "/run/trimsfs/mine.sock", os.O_CREAT | os.O_WRONLY)
    return found


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """A mount with a model for one group, and one for all."""
    directory = tmp_path_factory.mktemp("users") / "mount"
    store, config = directory.with_name("store"), directory.with_name("mount.toml")
    for name in ("private", "public"):
        (store / name).mkdir(parents=True)
        (store / name / "model").write_bytes(CONTENT)
    config.write_text(f'[[access]]\npath = "private"\ngid = {GROUP}\nmode = "0440"\n')
    with mounted(store, directory, "--config", str(config)) as mount:
        assert (mount.path / "private/model").read_bytes() == CONTENT
        yield mount


def test_a_user_gets_nothing_of_a_mounts_processes_and_files(mount: MountedStore, survived: Survived) -> None:
    """Neither of the keeper nor of servers, the one that stands by and fetch processes included."""
    # All are there, and no other begins meanwhile.
    wait_until(lambda: bool(ask(mount.path, {"do": "status"}, timeout_s=5)["standby"]), 30)
    wait_until(lambda: trimsfs("evict", mount.path / "private/model").returncode == 0)
    assert (mount.path / "private/model").read_bytes() == CONTENT  # by a fetch process, which waits for more to do
    wait_until(lambda: len(family(mount.control()["keeper_pid"])) > 5)
    lasting, passing = processes(mount)
    there = mount_at(mount.path)
    assert there is not None
    found: dict[str, str] = as_user(STRANGER, lambda: of_the_mount(mount, log_beside(mount.path.parent), there.device))
    for pid in lasting | passing:
        attempts: dict[str, str] = as_user(STRANGER, lambda pid=pid: of_a_process(pid))  # type: ignore[misc]
        ended = pid in passing and not alive(pid)
        found |= {what: came for what, came in attempts.items() if not (ended and came in ENDED)}
    blobs = [path for path in (mount.cache / "blobs").rglob("*") if path.is_file()]
    assert blobs
    found |= as_user(STRANGER, lambda: {str(path): attempted(path.read_bytes) for path in blobs})
    still, left = processes(mount)
    assert still == lasting
    assert left <= passing
    assert (mount.path / "private/model").read_bytes() == CONTENT
    assert {what: came for what, came in found.items() if came not in DENIED} == {}
    survived(
        "attempts of another user",
        injected=len(found),
        operations=len(found),
        errors=Counter(found.values()),
        allowed=DENIED,
    )


def test_what_others_have_open_cannot_be_opened_through_them(mount: MountedStore) -> None:
    """A reader that may has the model open; who may not finds no way by that."""
    reader = subprocess.Popen(
        ["sh", "-c", 'exec 5< "$1"; echo open; exec sleep 60', "sh", mount.path / "private/model"],
        stdout=subprocess.PIPE,
        extra_groups=[GROUP],
        user=3001,
        group=3001,
    )
    try:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"open\n"
        ways = [
            *(f"/proc/{reader.pid}/fd/5", f"/proc/{reader.pid}/task/{reader.pid}/fd/5"),
            *(f"/proc/{reader.pid}/root{mount.path}/private/model", f"/proc/self/root{mount.path}/private/model"),
            *(f"{mount.path}/private/../private/model", f"{mount.path}/public/../private/model"),
        ]
        found = as_user(STRANGER, lambda: [attempted(Path(way).read_bytes) for way in ways])
        assert found == ["EACCES"] * len(ways)
        # Root of a user namespace is the same user to the mount.
        command = ["unshare", "-Ur", "cat", str(mount.path / "private/model")]
        done = subprocess.run(command, capture_output=True, user=STRANGER, group=STRANGER, extra_groups=[], check=False)
        assert (done.returncode, done.stdout) == (1, b""), done.stderr
        assert as_user(STRANGER, (mount.path / "public/model").read_bytes) == CONTENT
    finally:
        reader.kill()
        reader.communicate()
