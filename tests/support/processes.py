"""Processes as the kernel shows them."""

from contextlib import suppress
from pathlib import Path


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def family(pid: int) -> list[int]:
    """A process and all below it, without those that end meanwhile."""
    tasks, children = list(Path("/proc").glob(f"{pid}/task/*/children")), list[str]()
    for task in tasks:
        with suppress(FileNotFoundError, ProcessLookupError):
            children += task.read_text().split()
    return [pid, *(below for child in children for below in family(int(child)))] if tasks else []
