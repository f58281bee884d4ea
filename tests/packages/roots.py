"""Clean roots of Debian 13, made by mmdebstrap, and what runs in them.

What runs in a root has namespaces of its own for mounts and processes: both end with it.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUILD_TIMEOUT_S = 900
TIMEOUT_S = 300
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
}
_MOUNTS = """
mount --bind /dev "$0/dev"
mount -t proc proc "$0/proc"
mount -t sysfs sysfs "$0/sys"
mount -t cgroup2 cgroup2 "$0/sys/fs/cgroup"
mount -t tmpfs -o mode=755 tmpfs "$0/run"
exec chroot "$0" "$@"
"""


@dataclass(frozen=True, slots=True)
class Root:
    """The root directory of a Debian."""

    path: Path

    def run(self, script: str) -> str:
        """Run a shell script in the root, which ends with its first error; what it prints."""
        return _finished(self._command("sh", "-euxc", script))

    def _command(self, *command: str) -> list[str]:
        spaces = ["--mount", "--pid", "--cgroup", "--fork", "--kill-child"]
        return ["unshare", *spaces, "sh", "-ec", _MOUNTS, str(self.path), *command]

    @contextmanager
    def booted(self) -> Iterator["BootedRoot"]:
        """The root as a running system: its systemd is process 1."""
        with subprocess.Popen(
            self._command("/lib/systemd/systemd"),
            env=ENVIRONMENT | {"container": "chroot"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                system = BootedRoot(self.path, process.pid)
                system.run("systemctl is-system-running --wait || systemctl list-units --failed")
                yield system
            finally:
                process.kill()


@dataclass(frozen=True, slots=True)
class BootedRoot:
    """A root that runs."""

    path: Path
    unshare: int

    def run(self, script: str) -> str:
        """Run a shell script beside its systemd, which ends with its first error; what it prints."""
        enter = ["nsenter", f"--target={self._systemd()}", "--mount", "--pid", "--cgroup", "--root", "--wd=/"]
        return _finished([*enter, "sh", "-euxc", script])

    def _systemd(self) -> str:
        """The process id of its systemd, once that serves."""
        deadline = time.monotonic() + TIMEOUT_S
        children = Path(f"/proc/{self.unshare}/task/{self.unshare}/children")
        while time.monotonic() < deadline:
            for child in children.read_text().split():
                if Path(f"/proc/{child}/root/run/systemd/private").exists():
                    return child
            time.sleep(0.1)
        raise TimeoutError("systemd does not start")


def make_root(directory: Path, *packages: str) -> Root:
    """A root with apt and these packages; without a compiler."""
    command = ["mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join(packages)}", "trixie", str(directory)]
    subprocess.run(command, check=True, timeout=BUILD_TIMEOUT_S)
    for name in ("hosts", "resolv.conf"):
        shutil.copy(Path("/etc", name), directory / "etc")
    assert not list((directory / "usr/bin").glob("*gcc*"))
    (directory / "store").mkdir()
    (directory / "store/model").write_bytes(os.urandom(20 << 20))
    (directory / "models").mkdir()
    return Root(directory)


def _finished(command: list[str]) -> str:
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd="/"
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
