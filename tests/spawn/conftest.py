"""Fixtures of fork servers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fork_servers import ForkServers, fork_servers


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[ForkServers]:
    """Fork servers of this test alone."""
    with fork_servers(tmp_path / "spawn") as started:
        yield started
