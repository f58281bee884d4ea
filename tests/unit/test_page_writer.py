"""Writing pages, with a clock that tells how fast memory is."""

import os
from pathlib import Path

import pytest

from trimsfs.fetch.processes.thread_copier import HUGE, SLOW_RATE, SMALL, SPAN, PageWriter


class Memory:
    """Writes, each of which costs what memory costs for pages of its size; nothing is written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writer = PageWriter()
        self.huge_are_slow = False
        self._cpu_s = 0.0
        monkeypatch.setattr("time.thread_time", lambda: self._cpu_s)
        monkeypatch.setattr("os.pwrite", self._pwrite)

    def _pwrite(self, _descriptor: int, part: memoryview, _position: int) -> int:
        self._cpu_s += len(part) / SLOW_RATE * (2 if self.huge_are_slow and len(part) == HUGE else 0.2)
        return len(part)

    def write(self, size: int) -> list[int]:
        """Write so many bytes in all; the sizes of the pieces, in order."""
        pieces = []
        while size > 0:
            pieces.append(self.writer.size)
            self.writer.write(-1, memoryview(bytes(pieces[-1])), 0)
            size -= pieces[-1]
        return pieces


def test_pages_are_huge_while_memory_is_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(Memory(monkeypatch).write(2 * SPAN)) == {HUGE}


def test_where_huge_pages_are_slow_one_is_tried_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch)
    memory.huge_are_slow = True
    assert memory.write(HUGE + SPAN + HUGE + SMALL) == [HUGE, *[SMALL] * (SPAN // SMALL), HUGE, SMALL]


def test_huge_pages_are_used_again_once_memory_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch)
    memory.huge_are_slow = True
    memory.write(HUGE)
    memory.huge_are_slow = False
    assert memory.write(SPAN + 3 * HUGE)[-3:] == [HUGE] * 3


def test_what_is_written_is_where_it_should_be(tmp_path: Path) -> None:
    content = os.urandom(HUGE)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        PageWriter().write(descriptor, memoryview(content), 5)
        assert os.pread(descriptor, HUGE + 10, 0) == bytes(5) + content
    finally:
        os.close(descriptor)
