"""Starts and stops declared mounts through systemd, as instances of trimsfs@.service or trimsfs-server@.service."""

import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

_RUNNING = Path("/run/systemd/system")
WATCHDOG_S = 60
"""How long a keeper may be silent before systemd replaces it: ``WatchdogSec=`` of the unit."""
_ERROR = re.compile(r"(?:\S+ \S+ ERROR [\w.]+|trimsfs|mountctl): (?!warning: )(.+)")
"""A line of a service's log that tells why its mount failed."""
_CHOSEN = {f"UnitFileState={state}" for state in ("enabled", "enabled-runtime")} | {
    f"ActiveState={state}" for state in ("active", "activating", "deactivating", "reloading")
}
"""What systemd says of a service that somebody has chosen for a mount."""


def unit_of(name: str) -> str:
    """The service of a declared mount: its server's if that is a service of its own, beside the keeper's."""
    server = f"trimsfs-server@{name}.service"
    properties = _output("systemctl", "show", "--property=UnitFileState,ActiveState", server)
    return _whole(name) if _CHOSEN.isdisjoint(properties.splitlines()) else server


def keeper_of(name: str) -> str | None:
    """The service of a declared mount's keeper, if its server is a service of its own."""
    return None if unit_of(name) == _whole(name) else f"trimsfs-keeper@{name}.service"


def _whole(name: str) -> str:
    """The service that is both the keeper and the server of a declared mount."""
    return f"trimsfs@{name}.service"


def manages(name: str) -> bool:
    """Whether systemd runs, and has the service of a declared mount."""
    if not _RUNNING.is_dir() or shutil.which("systemctl") is None:
        return False
    return _systemctl("cat", unit_of(name), quiet=True) == 0


def variables(name: str) -> dict[str, str]:
    """The environment variables that the service's files set."""
    return dict(each.partition("=")[::2] for each in shlex.split(_property(unit_of(name), "Environment")))


def start(name: str) -> tuple[int, str]:
    """Start the service; the exit code (that of the mount if the mount fails), and why it failed."""
    unit, began = unit_of(name), time.time()
    done = subprocess.run(["systemctl", "start", unit], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return 0, ""
    exited = _property(unit, "ExecMainCode") == str(os.CLD_EXITED)  # else the status is the number of a signal
    code = int(_property(unit, "ExecMainStatus") or 0) if exited else 0
    error = _last_error(unit, began)
    return code or done.returncode, done.stderr.rstrip() if error is None else f"mountctl: {name}: {error}"


def _last_error(unit: str, since: float) -> str | None:
    """The last error in a service's log since a time, if this user may read it."""
    _output("journalctl", "--sync")
    log = _output("journalctl", f"--unit={unit}", f"--since=@{since:.6f}", "--output=cat")
    errors = [match[1] for line in log.splitlines() if (match := _ERROR.fullmatch(line))]
    return errors[-1] if errors else None


def retries(name: str) -> bool:
    """Whether systemd starts the service now, or will soon, as it has failed."""
    return _property(unit_of(name), "ActiveState") == "activating"


def main_process(name: str) -> int:
    """The process of the service; 0 if none runs."""
    return int(_property(unit_of(name), "MainPID") or 0)


def restarts(name: str) -> bool:
    """Whether a service has the keeper as well and runs, or systemd is about to start it again."""
    return _property(_whole(name), "ActiveState") not in {"", "inactive", "failed"}


def stop(name: str) -> int:
    return _systemctl("stop", unit_of(name))


def _property(unit: str, which: str) -> str:
    """A property of a service; empty if it is not known."""
    return _output("systemctl", "show", f"--property={which}", "--value", unit).strip()


def _output(*command: str) -> str:
    """What a command prints, whatever it returns."""
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False).stdout


def _systemctl(*arguments: str, quiet: bool = False) -> int:
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(["systemctl", *arguments], stdout=output, stderr=output, check=False).returncode
