"""Runs commands that touch a mount, and so may hang.

The driver leaves a child that cannot be killed behind. It does not touch that mount again until the child has ended, so
that hanging children stay few.
"""

import json
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mountctl.extras.csi.status_errors import StatusError, unavailable
from mountctl.linux import child_process
from mountctl.linux.child_process import HangsError
from trimsfs.mountinfo import Mount

ANSWER_TIMEOUT_S = 5.0
"""How long a mount may take to answer a request that does not involve the store."""
FACTS_LIMIT = 1 << 20
"""Most bytes of what a server tells of itself: it may be in an attacker's hands."""


@dataclass(frozen=True, slots=True)
class Space:
    """What a mount says of its space: bytes for local copies, and the files that it knows."""

    total: int
    free: int
    files: int


class MountCommands:
    """Runs child processes, and tracks those that hang, by the device of their mount."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hanging: dict[str, list[subprocess.Popen[str]]] = {}

    def run(
        self, mount: Mount, command: list[str | Path], timeout_s: float
    ) -> "subprocess.CompletedProcess[str] | None":
        """Run a command that touches a mount; None if it did not end in time. Raises StatusError."""
        with self._lock:
            hanging = [process for process in self._hanging.get(mount.device, []) if process.poll() is None]
            self._hanging[mount.device] = hanging
        if hanging:
            raise no_answer(mount)
        try:
            return child_process.run(command, timeout_s)
        except HangsError as hangs:
            with self._lock:
                self._hanging[mount.device].append(hangs.process)
            return None

    def check_answers(self, mount: Mount) -> Space:
        """Check that a mount answers; returns its space. Raises StatusError (UNAVAILABLE)."""
        answer = self._ask(mount, ["stat", "-f", "-c", "%S %b %f %c", "--", mount.mountpoint])
        size, total, free, files = map(int, answer.split())
        return Space(total=size * total, free=size * free, files=files)

    def options(self, mount: Mount) -> dict[str, Any]:
        """The options that a mount's server has. Raises StatusError (UNAVAILABLE)."""
        command: list[str | Path] = ["head", "-c", str(FACTS_LIMIT), "--", mount.mountpoint / ".trims/control"]
        try:
            options: dict[str, Any] = json.loads(self._ask(mount, command))["options"]
        except (ValueError, LookupError, TypeError):
            raise unavailable(f"{mount.mountpoint}: its server tells no options: see its log") from None
        return options

    def _ask(self, mount: Mount, command: list[str | Path]) -> str:
        """What a command prints about a mount. Raises StatusError (UNAVAILABLE)."""
        done = self.run(mount, command, ANSWER_TIMEOUT_S)
        if done is None:
            raise no_answer(mount)
        if done.returncode != 0:
            reason = done.stderr.strip().rpartition(": ")[2]
            raise unavailable(f"{mount.mountpoint}: {reason}: its server has ended: see its log")
        return done.stdout


def no_answer(mount: Mount) -> StatusError:
    """The error for a mount that hangs."""
    return unavailable(f"{mount.mountpoint} does not answer: see its log, or `mountctl restart {mount.mountpoint}`")
