"""Starts and stops declared mounts through systemd, as instances of trimsfs@.service."""

import shutil
import subprocess
from pathlib import Path

_RUNNING = Path("/run/systemd/system")


def unit_of(name: str) -> str:
    """The service of a declared mount."""
    return f"trimsfs@{name}.service"


def manages(name: str) -> bool:
    """Whether systemd runs, and has the service of a declared mount."""
    if not _RUNNING.is_dir() or shutil.which("systemctl") is None:
        return False
    return _systemctl("cat", unit_of(name), quiet=True) == 0


def start(name: str) -> tuple[int, str]:
    """Start the service; the exit code (that of the mount if the mount fails), and the message of systemctl."""
    done = subprocess.run(["systemctl", "start", unit_of(name)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return 0, ""
    return int(_property(name, "ExecMainStatus") or 0) or done.returncode, done.stderr.rstrip()


def retries(name: str) -> bool:
    """Whether systemd starts the service now, or will soon, as it has failed."""
    return _property(name, "ActiveState") == "activating"


def restarts(name: str) -> bool:
    """Whether the service runs, or systemd is about to start it again."""
    if not manages(name):
        return False
    return _property(name, "ActiveState") not in {"", "inactive", "failed"}


def stop(name: str) -> int:
    """Stop the service; the exit code."""
    return _systemctl("stop", unit_of(name))


def _property(name: str, which: str) -> str:
    """A property of the service; empty if it is not known."""
    command = ["systemctl", "show", f"--property={which}", "--value", unit_of(name)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _systemctl(*arguments: str, quiet: bool = False) -> int:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(["systemctl", *arguments], stdout=output, stderr=output, check=False).returncode
