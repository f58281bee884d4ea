"""What ``make dist`` has built; clean roots of Debian 13, made by mmdebstrap, and what systemd-nspawn runs in them."""

import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trimsfs

REPOSITORY = Path(trimsfs.__file__).parents[1]
DIST = REPOSITORY / "dist"
WHEELHOUSE = REPOSITORY / "build/wheelhouse"
READER = Path(__file__).with_name("block_reader.py")
BUILD_TIMEOUT_S = 900
TIMEOUT_S = 300
STOP_TIMEOUT_S = 60
ENVIRONMENT = {
    "DEBIAN_FRONTEND": "noninteractive",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
}


@dataclass(frozen=True, slots=True)
class Root:
    """The root directory of a Debian."""

    path: Path

    def run(self, script: str) -> str:
        """Run a shell script in the root, which ends with its first error; what it prints."""
        variables = [f"--setenv={name}={value}" for name, value in ENVIRONMENT.items()]
        return _finished([*self._spawn(), "--console=pipe", *variables, "sh", "-euxc", script])

    def _spawn(self) -> list[str]:
        options = [
            "--quiet",
            "--keep-unit",
            "--register=no",
            f"--machine=trimsfs-{os.getpid()}",  # others may run at the same time
            "--timezone=off",
            f"--bind={self._fuse()}:/dev/fuse",
            f"--directory={self.path}",
        ]
        return ["systemd-nspawn", *options]

    def _fuse(self) -> Path:
        """A device /dev/fuse that all users may open, as Debian's udev has it; not every host does."""
        device = self.path.parent / "fuse"
        if not device.exists():
            os.mknod(device, stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
            device.chmod(0o666)
        return device

    @contextmanager
    def booted(self) -> Iterator["BootedRoot"]:
        """The root as a running system: its systemd is process 1."""
        silent = subprocess.DEVNULL
        with subprocess.Popen([*self._spawn(), "--boot"], stdin=silent, stdout=silent, stderr=silent) as process:
            try:
                yield BootedRoot(_systemd(process.pid))
            finally:
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT_S)
                finally:
                    process.kill()


@dataclass(frozen=True, slots=True)
class BootedRoot:
    """A root that runs."""

    systemd: int

    def run(self, script: str) -> str:
        """Run a shell script beside its systemd, which ends with its first error; what it prints."""
        spaces = ["--mount", "--pid", "--uts", "--ipc", "--cgroup", "--root", "--wdns=/"]
        return _finished(["nsenter", f"--target={self.systemd}", *spaces, "sh", "-euxc", script])

    @contextmanager
    def reading(self, model: str, *, count: int) -> Iterator["Reads"]:
        """Have processes read a model all the time, by opens; what they have seen is there after the block."""
        reads = Reads()
        self.run(f"""
            rm -rf /readers; mkdir /readers
            for number in $(seq {count}); do
                setsid python3 /{READER.name} {model} /store/model /readers/stop /readers/$number.json \\
                    < /dev/null > /dev/null 2>> /readers/crashed &
            done
        """)
        try:
            yield reads
        finally:
            said = self.run(f"""
                touch /readers/stop
                timeout 60 sh -c 'until test $(ls /readers/*.json | wc -l) = {count}; do sleep 0.1; done' || true
                cat /readers/crashed >&2
                cat /readers/*.json
            """)
        reads.add([json.loads(line) for line in said.splitlines()], count)


@dataclass(slots=True)
class Reads:
    """What the processes of `BootedRoot.reading` have seen: the reads of the slowest, and the longest of all."""

    fewest: int = 0
    longest_s: float = 0.0
    errors: list[str] = field(default_factory=list)

    def add(self, reports: list[dict[str, Any]], count: int) -> None:
        """Take the reports of all readers. One that lacks is an error."""
        self.fewest = min((report["reads"] for report in reports), default=0)
        self.longest_s = max((report["longest_s"] for report in reports), default=0.0)
        self.errors = [error for report in reports for error in report["errors"]]
        self.errors += [f"{count - len(reports)} readers hang"] * (len(reports) < count)


def built(pattern: str) -> Path:
    """What ``make dist`` has built of this version."""
    (found,) = DIST.glob(pattern.format(version=trimsfs.__version__))
    return found


def make_root(directory: Path, *packages: str) -> Root:
    """A root with apt and these packages, a model in /store, and an empty directory /models; without a compiler."""
    command = ["mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join(packages)}", "trixie", str(directory)]
    subprocess.run(command, check=True, timeout=BUILD_TIMEOUT_S)
    shutil.copy("/etc/hosts", directory / "etc")
    shutil.copy(READER, directory)
    assert not list((directory / "usr/bin").glob("*gcc*"))
    (directory / "store").mkdir()
    (directory / "store/model").write_bytes(os.urandom(20 << 20))
    (directory / "models").mkdir()
    return Root(directory)


def _systemd(ancestor: int) -> int:
    """The process id of the systemd that *ancestor* has started, once that has booted."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        for process in _descendants(ancestor):
            if Path(f"/proc/{process}/root/run/systemd/private").exists():
                BootedRoot(process).run("systemctl is-system-running --wait || systemctl list-units --failed")
                return process
        time.sleep(0.1)
    raise TimeoutError("systemd does not start")


def _descendants(process: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return
    for child in children:
        yield int(child)
        yield from _descendants(int(child))


def _finished(command: list[str]) -> str:
    done = subprocess.run(
        command,
        env=ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd="/",
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout
