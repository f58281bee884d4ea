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


def start(name: str) -> int:
    """Start the service; the exit code."""
    return _systemctl("start", unit_of(name))


def stop(name: str) -> int:
    """Stop the service; the exit code."""
    return _systemctl("stop", unit_of(name))


def _systemctl(*arguments: str, quiet: bool = False) -> int:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(["systemctl", *arguments], stdout=output, stderr=output, check=False).returncode
