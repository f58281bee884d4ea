"""Who holds a lease, for operators to see."""

import re
from pathlib import Path

from trimsfs.tiers.gpu.pool import Holder

_PROCESS = re.compile(r"^Tgid:\s*([0-9]+)$", re.MULTILINE)
_CONTAINER = re.compile(r"([0-9a-f]{12})[0-9a-f]{52}")
"""The identifier of a container in the name of its control group, by the engines' common habit."""


def holder_of(uid: int, thread: int) -> Holder:
    """A user and a process, by one of its threads, 0 for one of another PID namespace; with its container."""
    if thread == 0:
        return Holder(uid=uid)
    process = _found(_PROCESS, thread, "status")
    return Holder(uid=uid, pid=int(process or thread), container=_found(_CONTAINER, thread, "cgroup"))


def _found(pattern: re.Pattern[str], thread: int, file: str) -> str | None:
    """What a pattern finds in a file of a thread in /proc; None when that is gone."""
    try:
        found = pattern.search(Path(f"/proc/{thread}/{file}").read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None
