"""Identifies the holder of a lease for operators: user, process and container."""

import re
from pathlib import Path

from trimsfs.tiers.gpu.pool import Holder

_PROCESS = re.compile(r"^Tgid:\s*([0-9]+)$", re.MULTILINE)
_CONTAINER = re.compile(r"([0-9a-f]{12})[0-9a-f]{52}")
"""The container's identifier, which engines put into the name of its control group."""


def holder_of(uid: int, thread: int) -> Holder:
    """The holder with this user id and thread; a *thread* of 0 is one of another PID namespace."""
    if thread == 0:
        return Holder(uid=uid)
    process = _found(_PROCESS, thread, "status")
    return Holder(uid=uid, pid=int(process or thread), container=_found(_CONTAINER, thread, "cgroup"))


def _found(pattern: re.Pattern[str], thread: int, file: str) -> str | None:
    """The group that a pattern matches in a thread's file in /proc; None when the thread is gone."""
    try:
        found = pattern.search(Path(f"/proc/{thread}/{file}").read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None
