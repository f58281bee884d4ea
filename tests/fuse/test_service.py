"""A mount as a service: what systemd is told, and that a keeper that is killed is gone on with.

The test stands in for systemd, by the protocol of sd_notify(3).
"""

import contextlib
import mmap
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mountctl.keeper.control_socket import ask
from tests.fuse.test_mounting import alive
from tests.support.mounts import MOUNTCTL, trimsfs, wait_until
from trimsfs.mountinfo import mount_at

UNIT = Path(__file__).parents[2] / "packaging/systemd/trimsfs@.service"
CONTENT = random.Random(1).randbytes(5 << 20)

STARTER = """
import fcntl, os, sys
kept, command = [int(number) for number in sys.argv[1].split(",") if number], sys.argv[2:]
for number, descriptor in enumerate([fcntl.fcntl(descriptor, fcntl.F_DUPFD, 100) for descriptor in kept], 3):
    os.dup2(descriptor, number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(command[0], command)
"""


class Manager:
    """Starts a service, hears what it says and keeps its descriptors, as systemd does."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._address = str(directory / "notify")
        self._socket.bind(self._address)
        self._log = directory / "service.log"
        self.stored: dict[str, int] = {}
        self.said: list[str] = []
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *command: str) -> None:
        """Start the service with what was stored, as descriptors 3 and up."""
        names, descriptors = list(self.stored), list(self.stored.values())
        environment = os.environ | {
            "NOTIFY_SOCKET": self._address,
            "WATCHDOG_USEC": "1000000",
            "TRIMSFS_CONFIG": "/dev/null",
        }
        if names:
            environment |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}

        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", STARTER, ",".join(map(str, descriptors)), *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=descriptors,
                start_new_session=True,
            )

    def hear(self, wanted: str, timeout_s: float = 30) -> None:
        """Wait until the service says something."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self.said:
            assert select.select([self._socket], [], [], max(0, deadline - time.monotonic()))[0], self.log()
            data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 4)
            lines = data.decode().split("\n")
            self.said += lines
            if "FDSTORE=1" in lines:
                name = next(line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME="))
                self.stored[name] = descriptors[0]
            if "FDSTOREREMOVE=1" in lines:
                os.close(self.stored.pop(lines[1].removeprefix("FDNAME=")))

    def log(self) -> str:
        return self._log.read_text()

    def kill(self) -> None:
        """End all of the service at once, as a watchdog or the OOM killer would."""
        assert self.process is not None
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in (self.process.pid, *map(int, children)):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(20)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(40)
        for descriptor in self.stored.values():
            os.close(descriptor)
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(tmp_path)) as manager:
        yield manager


@pytest.fixture
def service(store_directory: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """The mount point of a declared mount, and the command of its service."""
    (store_directory / "model").write_bytes(CONTENT)
    declared = tmp_path / "mounts.d"
    declared.mkdir()
    mountpoint = tmp_path / "models"
    lines = [f'mountpoint = "{mountpoint}"', f'store = "{store_directory}"', f'cache_dir = "{tmp_path / "cache"}"']
    (declared / "models.toml").write_text("\n".join(lines))
    return mountpoint, [MOUNTCTL, "run", "models", "--mounts-dir", str(declared)]


def test_service_tells_that_it_is_ready_and_alive_and_stops(service: tuple[Path, list[str]], manager: Manager) -> None:
    mountpoint, command = service
    manager.start(*command)
    manager.hear("READY=1")
    assert (mountpoint / "model").read_bytes() == CONTENT
    manager.hear("WATCHDOG=1")
    manager.hear("FDNAME=order")
    assert set(manager.stored) == {"ledger", "fuse", "lock", "order"}
    assert manager.process is not None
    manager.process.send_signal(signal.SIGTERM)
    manager.hear("STOPPING=1")
    assert manager.process.wait(20) == 0
    assert mount_at(mountpoint) is None


def test_service_that_is_killed_goes_on_with_the_same_mount(service: tuple[Path, list[str]], manager: Manager) -> None:
    mountpoint, command = service
    manager.start(*command)
    manager.hear("READY=1")
    manager.hear("FDNAME=order")
    mount = mount_at(mountpoint)
    assert mount is not None
    assert f'"device": "{mount.device}"' in os.pread(manager.stored["order"], 1 << 16, 0).decode()
    with (mountpoint / "model").open("rb", buffering=0) as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
        device = os.fstat(file.fileno()).st_dev
        for _ in range(3):
            manager.kill()
            manager.said.clear()
            manager.start(*command)
            manager.hear("READY=1")
            assert os.pread(file.fileno(), len(CONTENT), 0) == CONTENT == mapping[:]
            assert (mountpoint / "model").read_bytes() == CONTENT
            assert (mountpoint / "model").stat().st_dev == device
        mapping.close()
    facts = ask(mountpoint, {"do": "status"}, timeout_s=5)
    assert facts["state"] == "serving"
    assert manager.process is not None
    assert facts["keeper_pid"] == manager.process.pid
    assert trimsfs("umount", mountpoint).returncode == 0
    assert manager.process.wait(20) == 0
    wait_until(lambda: not alive(facts["keeper_pid"]))


def test_a_request_that_waits_when_all_is_killed_is_answered_later(
    service: tuple[Path, list[str]], manager: Manager
) -> None:
    mountpoint, command = service
    manager.start(*command)
    manager.hear("READY=1")
    manager.hear("FDNAME=order")
    manager.kill()
    reader = subprocess.Popen(["cat", mountpoint / "model"], stdout=subprocess.PIPE)
    time.sleep(0.5)
    assert reader.poll() is None
    manager.said.clear()
    manager.start(*command)
    output, _ = reader.communicate(timeout=30)
    assert output == CONTENT


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "trimsfs@.service"
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/mountctl", MOUNTCTL))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=55", unit],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
