"""What the kernel tells of processes."""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")


def states(pids: Iterable[int]) -> dict[int, str]:
    """The state of each process that there is, as in proc(5): ``D`` waits in the kernel and cannot be killed yet."""
    found = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            found[pid] = _fields(pid)[0]
    return found


def descriptors(pid: int) -> Counter[str]:
    """What a process has open, by kind: how many of each."""
    found: Counter[str] = Counter()
    for entry in (PROC / str(pid) / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(entry)
            name = target.split(":")[0] if not target.startswith("/") else os.path.dirname(target)
            if target.startswith("/memfd:"):
                name = "memory"
            elif target.endswith("(deleted)"):
                name = "what has been deleted"
            found["blobs" if name.rpartition("/")[0].endswith("/blobs") else name] += 1
    return found


def seeing(mountpoint: Path) -> list[int]:
    """The processes in whose mount namespaces there is a mount at a path."""
    found = []
    for entry in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f" {mountpoint} " in (entry / "mountinfo").read_text():
                found.append(int(entry.name))
    return found


def described(pid: int) -> str:
    """What a process is, for who has to find out why it is there."""
    try:
        command = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        state, parent = _fields(pid)[:2]
    except OSError:
        return f"{pid} is gone"
    return f"{pid} of {parent} ({state}) {command}"


def _fields(pid: int) -> list[str]:
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def stacks(pid: int) -> str:
    """Where each thread of a process waits in the kernel, for who has to find out why."""
    told = []
    for task in sorted((PROC / str(pid) / "task").iterdir()):
        with contextlib.suppress(OSError):
            state = (task / "stat").read_text().rpartition(")")[2].split()[0]
            told.append(f"{task.name} {(task / 'comm').read_text().strip()} {state}\n{(task / 'stack').read_text()}")
    return "\n".join(told)
