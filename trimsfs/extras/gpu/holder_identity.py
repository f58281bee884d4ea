"""Identifies the holder of a lease for operators: user, process and container."""

import re
from pathlib import Path

from trimsfs.extras.gpu.tier.leased_copies import Holder
from trimsfs.processes import container_of

_PROCESS = re.compile(r"^Tgid:\s*([0-9]+)$", re.MULTILINE)


def holder_of(uid: int, thread: int) -> Holder:
    """The holder with this user id and thread; *thread* is 0 in another PID namespace."""
    if thread == 0:
        return Holder(uid=uid)
    return Holder(uid=uid, pid=_process_of(thread), container=container_of(thread))


def _process_of(thread: int) -> int:
    try:
        # As bytes: text would also end lines at carriage returns, which a program's name may have.
        match = _PROCESS.search(Path(f"/proc/{thread}/status").read_bytes().decode(errors="replace"))
    except OSError:
        return thread  # it has ended
    return int(match[1]) if match else thread
