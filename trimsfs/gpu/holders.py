"""Who holds a lease, for operators to see."""

import re
from pathlib import Path

from trimsfs.tiers.gpu.pool import Holder

_CONTAINER = re.compile(r"([0-9a-f]{12})[0-9a-f]{52}")
"""The identifier of a container in the name of its control group, by the engines' common habit."""


def holder_of(uid: int, pid: int) -> Holder:
    """A user and a process, 0 for one of another PID namespace, with the container that it is in."""
    return Holder(uid=uid, pid=pid, container=_container(pid) if pid else None)


def _container(pid: int) -> str | None:
    try:
        groups = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError:
        return None
    found = _CONTAINER.search(groups)
    return found[1] if found else None
