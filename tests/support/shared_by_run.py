"""What the processes of a run of the tests share: a mark in their environment, and a temporary directory."""

import tempfile
from pathlib import Path

MARK = "STARTED_BY_TESTS"
"""The variable that all processes inherit which a run has started."""


def shared_by_run(mark: str) -> Path:
    """The temporary directory of a run, by its mark; it goes with the run."""
    return Path(tempfile.gettempdir(), f"trimsfs-tests-{mark}")
