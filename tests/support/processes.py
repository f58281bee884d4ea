"""Programs that are run to their end, and processes as the kernel shows them."""

import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any


def run(
    *command: str | Path, check: bool = False, timeout: float = 60, **options: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end, and hear what it says. *options* are those of `subprocess.run`."""
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=check, timeout=timeout, **options
    )


def mapped_bytes(pid: int, name: str, which: str = "Pss") -> int:
    """Bytes of a process's mappings of a file: its share of the pages; other *which* ones are fields of smaps, too."""
    total, inside = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(f"/{name}")
        elif inside and line.startswith(f"{which}:"):
            total += int(line.split()[1]) * 1024
    return total


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def family(pid: int) -> list[int]:
    """A process and all below it, without those that end meanwhile."""
    tasks, children = list(Path("/proc").glob(f"{pid}/task/*/children")), list[str]()
    for task in tasks:
        with suppress(FileNotFoundError, ProcessLookupError):
            children += task.read_text().split()
    return [pid, *(below for child in children for below in family(int(child)))] if tasks else []
