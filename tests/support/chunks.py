"""Chunks of a few bytes, so that objects of many chunks stay small."""

import sys

import pytest

SMALL_CHUNK = 16 * 1024


def set_chunk_size(monkeypatch: pytest.MonkeyPatch, size: int) -> int:
    """Give chunks another size for the length of a test."""
    for name, module in list(sys.modules.items()):
        if name.startswith("trimsfs.") and hasattr(module, "CHUNK_SIZE"):
            monkeypatch.setattr(module, "CHUNK_SIZE", size)
    monkeypatch.setattr("trimsfs.tiers.disk.space.HEADROOM", 4 * size)
    monkeypatch.setattr("trimsfs.fetch.fetcher.REQUEST_MEMORY", size // 4)
    return size
