"""A systemd of its own: process 1 of its namespaces, with the units of this repository and nothing else to start."""

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.control_groups import control_groups
from tests.support.mounts import COMMAND_TIMEOUT_S, MOUNTCTL, TRIMSFS, wait_until

SYSTEMD = Path("/usr/lib/systemd/systemd")
UNITS = Path(__file__).parents[2] / "packaging/systemd"
BOOT_TIMEOUT_S = 30.0
_BOOT = """
echo $$ > "$1/cgroup.procs"
exec unshare --pid --fork --kill-child --mount --cgroup --uts --ipc --propagation slave sh -euc "$2" sh "$3"
"""
_INIT = """
mount --make-rshared /  # as systemd does on a host, and nspawn in a container
umount --all --lazy --types fuse.trimsfs  # a copy would keep the mounts of other tests
for directory in /run /var/cache /var/log /etc/systemd/system; do mount -t tmpfs -o mode=755 tmpfs $directory; done
mount -t proc proc /proc
mount -t sysfs -o ro sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t fusectl fusectl /sys/fs/fuse/connections
cp "$1"/* /etc/systemd/system
exec env -i container=test PATH="$PATH" /usr/lib/systemd/systemd --unit=test.target --log-target=null --show-status=no
"""
_TARGET = """[Unit]
DefaultDependencies=no
Wants=systemd-journald.socket systemd-journald.service
"""


@dataclass(frozen=True, slots=True)
class Booted:
    """A systemd that runs, by its process id, and the variables of what is run beside it."""

    systemd: int
    environment: dict[str, str]

    def command(self, *command: str | Path) -> list[str]:
        """The command line that runs a command beside this systemd."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        spaces = ["--mount", "--pid", "--uts", "--ipc", "--cgroup"]
        return ["nsenter", f"--target={self.systemd}", *spaces, "env", *variables, *map(str, command)]

    def run(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        """Run a command beside this systemd, whatever it returns."""
        return subprocess.run(
            self.command(*command), capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False, cwd="/"
        )

    def mountctl(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return self.run(MOUNTCTL, *arguments)

    def state(self, name: str) -> str:
        """The state of the unit of a declared mount."""
        return self.run("systemctl", "is-active", f"trimsfs@{name}").stdout.strip()


@contextmanager
def booted(mounts_directory: Path) -> Iterator[Booted]:
    """Boot a systemd whose units mount what *mounts_directory* declares; all that it runs ends with it."""
    variables = {
        "HOME": str(mounts_directory),
        "PYTHONPATH": str(UNITS.parents[1]),
        "TRIMSFS_CONFIG": "/dev/null",
        "TRIMSFS_MOUNTS_DIR": str(mounts_directory),
    }
    group = control_groups() / f"trimsfs-test-{os.getpid()}"
    group.mkdir()
    with tempfile.TemporaryDirectory() as units:
        for unit in UNITS.glob("*.service"):
            Path(units, unit.name).write_text(_adapted(unit.read_text(), variables))
        Path(units, "test.target").write_text(_TARGET)
        command = ["sh", "-euc", _BOOT, "sh", str(group), _INIT, units]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL) as unshare:
            try:
                yield Booted(_booted(unshare), variables)
            finally:
                unshare.kill()
                unshare.wait()
                wait_until(lambda: _removed(group))


def _adapted(unit: str, variables: dict[str, str]) -> str:
    """A unit that runs the programs of these tests, and for which systemd does not set up the host first."""
    settings = [f'Environment="{name}={value}"' for name, value in variables.items()]
    unit = unit.replace("[Unit]\n", "[Unit]\nDefaultDependencies=no\n")
    unit = unit.replace("[Service]\n", "\n".join(["[Service]", *settings, ""]))
    unit = unit.replace("PrivateTmp=yes\n", "")  # stores of tests lie below /tmp, and perhaps this repository
    return unit.replace("/usr/local/bin/mountctl", MOUNTCTL).replace("/usr/local/bin/trimsfs", TRIMSFS)


def _booted(unshare: "subprocess.Popen[bytes]") -> int:
    """The process id of the systemd that *unshare* has started, once it takes commands."""
    children = Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children")
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while time.monotonic() < deadline and unshare.poll() is None:
        for child in map(int, children.read_text().split()):
            if Booted(child, {}).run("systemctl", "is-system-running").stdout == "running\n":
                return child
        time.sleep(0.1)
    raise TimeoutError("systemd does not start")


def _removed(group: Path) -> bool:
    """Remove a control group with those below it; whether that is done, as no process is left in them."""
    for directory, _, _ in os.walk(group, topdown=False):
        try:
            os.rmdir(directory)
        except OSError:
            return False
    return True
