"""Starts and stops declared mounts through systemd, as instances of trimsfs@.service."""

import re
import shutil
import subprocess
import time
from pathlib import Path

_RUNNING = Path("/run/systemd/system")
WATCHDOG_S = 60
"""How long a keeper may be silent before systemd replaces it: ``WatchdogSec=`` of the unit."""
_ERROR = re.compile(r"(?:\S+ \S+ ERROR [\w.]+|trimsfs|mountctl): (?!warning: )(.+)")
"""A line of a service's log that tells why its mount failed."""


def unit_of(name: str) -> str:
    """The service of a declared mount."""
    return f"trimsfs@{name}.service"


def manages(name: str) -> bool:
    """Whether systemd runs, and has the service of a declared mount."""
    if not _RUNNING.is_dir() or shutil.which("systemctl") is None:
        return False
    return _systemctl("cat", unit_of(name), quiet=True) == 0


def start(name: str) -> tuple[int, str]:
    """Start the service; the exit code (that of the mount if the mount fails), and why it failed."""
    began = time.time()
    done = subprocess.run(["systemctl", "start", unit_of(name)], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return 0, ""
    code = int(_property(name, "ExecMainStatus") or 0) or done.returncode
    return code, _last_error(name, began) or done.stderr.rstrip()


def _last_error(name: str, since: float) -> str | None:
    """The last error in the service's log since a time, if this user may read it."""
    _output("journalctl", "--sync")
    log = _output("journalctl", f"--unit={unit_of(name)}", f"--since=@{since:.6f}", "--output=cat")
    errors = [found[1] for line in log.splitlines() if (found := _ERROR.fullmatch(line))]
    return f"mountctl: {name}: {errors[-1]}" if errors else None


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
    return _output("systemctl", "show", f"--property={which}", "--value", unit_of(name)).strip()


def _output(*command: str) -> str:
    """What a command prints, whatever it returns."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout


def _systemctl(*arguments: str, quiet: bool = False) -> int:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(["systemctl", *arguments], stdout=output, stderr=output, check=False).returncode
