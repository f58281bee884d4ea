"""A control group with a limit of memory, of either version."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def limited(limit: int) -> Iterator[Path]:
    """A group that may hold *limit* bytes of memory. Raises OSError where none can be made."""
    first = (ROOT / "memory/memory.limit_in_bytes").exists()
    group = (ROOT / "memory" if first else ROOT) / f"trimsfs-test-{uuid.uuid4().hex[:8]}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit))
        yield group
    finally:
        os.rmdir(group)


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """The ``cgroup.procs`` file of a group that may hold *limit* bytes; skips the test where none can be made."""
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(limited(limit))
        except OSError as error:
            pytest.skip(f"no control group with a limit of memory can be made: {error}")
        yield group / "cgroup.procs"


def used(group: Path) -> tuple[int, int]:
    """Bytes of memory that the processes of a group have used at most, and those that are anonymous now."""
    first = (group / "memory.max_usage_in_bytes").exists()
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    peak = group / ("memory.max_usage_in_bytes" if first else "memory.peak")
    return int(peak.read_text()), int(statistics["total_rss" if first else "anon"])


def killed(group: Path) -> int:
    """How many processes of a group were killed for want of memory."""
    name = "memory.oom_control" if (group / "memory.oom_control").exists() else "memory.events"
    return int(dict(line.split() for line in (group / name).read_text().splitlines())["oom_kill"])
