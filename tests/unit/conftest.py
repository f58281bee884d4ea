"""Fixtures of the unit tests."""

import sys

import pytest

SMALL_CHUNK = 16 * 1024


def set_chunk_size(monkeypatch: pytest.MonkeyPatch, size: int) -> int:
    """Give chunks another size for the length of a test."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trimsfs.") and hasattr(module, "CHUNK_SIZE"):
            monkeypatch.setattr(module, "CHUNK_SIZE", size)
    monkeypatch.setattr("trimsfs.tiers.disk.HEADROOM", 4 * size)
    return size


@pytest.fixture
def chunk_size(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes in a chunk, made few, so that objects of many chunks stay small."""
    return set_chunk_size(monkeypatch, SMALL_CHUNK)
