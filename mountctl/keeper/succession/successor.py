"""The successor of a killed or stopped keeper: it takes the mount over while the server that is left serves on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mountctl.keeper.fuse_connection import AlreadyKeptError
from mountctl.keeper.keeper import Keeper
from mountctl.keeper.reporter import Reporter
from mountctl.keeper.servers.server_source import OwnServers
from mountctl.keeper.succession.predecessor import find_predecessor
from mountctl.linux import logfile
from trimsfs.errors import TakeoverError, TrimsError
from trimsfs.polling import readable

END_TIMEOUT_S = 5.0
"""How long a killed keeper may take to end."""
_OF_A_SERVICE = ("NOTIFY_", "WATCHDOG_", "LISTEN_")
"""Prefixes of the variables that a service manager has set for the killed keeper alone."""


def recover(mountpoint: Path, *, timeout_s: float) -> dict[str, Any]:
    """Start the successor of a killed keeper; its report: ``ready``, or ``failed`` with the error."""
    receiver, sender = os.pipe()
    command = [sys.executable, "-m", "mountctl.keeper", "--recover", str(mountpoint), "--status-fd", str(sender)]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[sender], start_new_session=True, cwd="/")
    os.close(sender)
    with os.fdopen(receiver) as status:
        heard = readable([status], timeout_s)
        line = status.readline() if heard else ""
    problem = "the keeper has ended" if heard else f"no server took over within {timeout_s:.0f} s"
    report: dict[str, Any] = json.loads(line) if line else {"type": "failed", "kind": "", "error": problem}
    return report


def follow(mountpoint: Path, status: int | None) -> int:
    """Run as the successor of a killed keeper; the exit code. *status* is that of `Reporter`."""
    try:
        keeper = _successor(mountpoint, status)
    except TrimsError as error:
        report = {"type": "failed", "kind": type(error).__name__, "error": str(error)}
        Reporter(status, None).outcome(report, str(error))
        return 1
    return keeper.run()


def _successor(mountpoint: Path, status: int | None) -> Keeper:
    """The successor of a killed keeper. Raises TrimsError."""
    left = find_predecessor(mountpoint)
    try:
        log_file = Path(left.order["options"]["log_file"])
        log_file.parent.mkdir(mode=0o755, parents=True, exist_ok=True)  # a mount in the foreground has none
        logfile.append_output_to(log_file)
        os.environ.clear()
        os.environ.update(
            {name: value for name, value in left.environment.items() if not name.startswith(_OF_A_SERVICE)}
        )
        if left.keeper is not None:
            left.keeper.kill()
            left.keeper.wait(END_TIMEOUT_S)
        keeper = Keeper(left.order | {"foreground": False}, OwnServers(), status, left.descriptors, left.server)
    except (AlreadyKeptError, subprocess.TimeoutExpired):
        raise TakeoverError(f"{mountpoint}: another keeper is taking it over: wait") from None
    except OSError as error:
        raise TakeoverError(f"{mountpoint}: {error.filename}: {error.strerror}") from error
    before = "a killed one" if left.keeper is None else f"pid {left.keeper.pid}, which was stopped and is killed"
    Reporter(None, None).info(f"the keeper, pid {os.getpid()}, takes over from {before}")
    return keeper
