"""Fixtures of the tests of the disk tier."""

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """Boots the host anew."""
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("one")
    monkeypatch.setattr("trimsfs.tiers.index.index.BOOT_ID", boot_id)
    return lambda: boot_id.write_text("two")
