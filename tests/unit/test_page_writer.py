"""Writing pages, with a clock that tells how fast memory is."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trimsfs.fetch import page_writer
from trimsfs.fetch.page_writer import HUGE, SLOW_RATE, SMALL, SPAN, Mode, PageWriter
from trimsfs.tiers.host.page_cache import resident_bytes


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A descriptor of a file that is one hole."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(descriptor, 4 * SPAN)
    yield descriptor
    os.close(descriptor)


class Memory:
    """Writes of a `PageWriter`, each of which costs what memory costs that comes from where it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, descriptor: int) -> None:
        self.writer = PageWriter()
        self.slow: set[Mode] = set()
        self.populated: list[tuple[int, int]] = []
        self._descriptor = descriptor
        self._offset = 0
        self._cpu_s = 0.0
        monkeypatch.setattr("time.thread_time", lambda: self._cpu_s)
        monkeypatch.setattr(page_writer, "populate", lambda _, start, stop: self.populated.append((start, stop)))
        monkeypatch.setattr("os.pwrite", self._pwrite)

    def _pwrite(self, _descriptor: int, part: memoryview, _position: int) -> int:
        self._cpu_s += len(part) / SLOW_RATE * (2 if self.writer.mode in self.slow else 0.2)
        return len(part)

    def write(self, size: int) -> list[Mode]:
        """Write so many bytes in all; the modes in which it was done, in order."""
        modes = []
        while size > 0:
            modes.append(self.writer.mode)
            piece = self.writer.size
            self.writer.write(self._descriptor, memoryview(bytes(piece)), self._offset)
            self._offset += piece
            size -= piece
        return list(dict.fromkeys(modes))


def test_pages_are_huge_while_memory_is_at_hand(monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    memory = Memory(monkeypatch, file)
    assert memory.write(2 * SPAN) == [Mode.HUGE]
    assert memory.writer.size == HUGE


def test_pages_are_small_where_only_these_are_quick_and_huge_ones_are_tried_again(
    monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    memory = Memory(monkeypatch, file)
    memory.slow = {Mode.HUGE}
    assert memory.write(SPAN) == [Mode.HUGE, Mode.SMALL]
    memory.slow = set()
    assert memory.write(2 * SPAN)[-1] is Mode.HUGE


def test_one_small_page_that_is_slow_says_little(monkeypatch: pytest.MonkeyPatch, file: int) -> None:
    memory = Memory(monkeypatch, file)
    memory.slow = {Mode.HUGE}
    memory.write(HUGE)
    memory.slow.add(Mode.SMALL)
    memory.write(SMALL)
    memory.slow.remove(Mode.SMALL)
    assert memory.write(SPAN // 2) == [Mode.SMALL]


def test_where_all_memory_is_slow_pages_are_populated_before_they_are_written(
    monkeypatch: pytest.MonkeyPatch, file: int
) -> None:
    memory = Memory(monkeypatch, file)
    memory.slow = set(Mode)
    assert memory.write(2 * HUGE + 3 * HUGE) == [Mode.HUGE, Mode.SMALL, Mode.POPULATED]
    first = 2 * HUGE
    assert memory.populated == [(first + number * HUGE, first + (number + 1) * HUGE) for number in range(3)]
    memory.slow = {Mode.HUGE, Mode.SMALL}
    assert memory.write(HUGE) == [Mode.POPULATED]
    assert memory.writer.mode is Mode.HUGE  # memory has come


def test_a_populated_file_has_the_bytes_that_are_written(file: int) -> None:
    writer = PageWriter()
    writer.mode = Mode.POPULATED
    content = os.urandom(HUGE)
    writer.write(file, memoryview(content), HUGE + 5)
    assert os.pread(file, HUGE + 10, HUGE) == bytes(5) + content + bytes(5)
    populated = resident_bytes(file)
    assert populated is None or populated >= HUGE


def test_a_file_that_ends_too_soon_is_extended_as_ever(tmp_path: Path) -> None:
    writer = PageWriter()
    writer.mode = Mode.POPULATED
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        writer.write(descriptor, memoryview(b"content"), 0)
        assert os.pread(descriptor, 10, 0) == b"content"
    finally:
        os.close(descriptor)
