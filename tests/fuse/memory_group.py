"""A control group with a limit of memory, of either version."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """The ``cgroup.procs`` file of a group that may hold *limit* bytes; skips the test where none can be made."""
    if (ROOT / "memory/memory.limit_in_bytes").exists():
        group, name = ROOT / "memory" / f"trimsfs-test-{uuid.uuid4().hex[:8]}", "memory.limit_in_bytes"
    else:
        group, name = ROOT / f"trimsfs-test-{uuid.uuid4().hex[:8]}", "memory.max"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        if not (group / name).exists():
            pytest.skip("the memory controller is not enabled here")
        (group / name).write_text(str(limit))
        yield group / "cgroup.procs"
    finally:
        os.rmdir(group)
