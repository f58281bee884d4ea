"""What outlives a server: nothing half written, nothing lost, nothing mixed up."""

import mmap
import os
import random
import signal
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimsfs.errors import TakeoverError
from trimsfs.handover import ledger as ledgers
from trimsfs.handover.ledger import UNRECORDED, Ledger, Record, RecordKind


@pytest.fixture
def memory() -> int:
    """A descriptor of memory that outlives the ledgers on it."""
    return os.memfd_create("test")


def opened(memory: int) -> Ledger:
    return Ledger(os.dup(memory))


def taken(memory: int) -> dict[int, Record]:
    """Everything that a successor finds, by number."""
    ledger = opened(memory)
    return {entry.number: entry for kind in RecordKind for entry in ledger.inherited(kind)}


def test_a_successor_finds_what_is_in_use(memory: int) -> None:
    ledger = opened(memory)
    slots = {number: ledger.add(RecordKind.INODE, number, b"x" * number, count=number) for number in (1, 50, 500)}
    ledger.set_count(slots[50], 0)
    ledger.set_count(slots[500], 7)
    ledger.add(RecordKind.HANDLE, 2, b"")

    found = taken(memory)

    assert {(entry.number, entry.kind, entry.count, len(entry.content)) for entry in found.values()} == {
        (1, RecordKind.INODE, 1, 1),
        (500, RecordKind.INODE, 7, 500),
        (2, RecordKind.HANDLE, 1, 0),
    }


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 200), st.integers(0, 3)), max_size=60))
def test_it_holds_what_was_last_said(steps: list[tuple[int, int, int]]) -> None:
    memory = os.memfd_create("test")
    try:
        ledger = opened(memory)
        slots: dict[int, int] = {}
        said: dict[int, tuple[int, bytes]] = {}
        for turn, (number, size, count) in enumerate(steps):
            if number in slots:
                ledger.set_count(slots[number], count)
                said[number] = count, said[number][1]
                if count == 0:
                    del slots[number], said[number]
            elif count:
                content = bytes([turn]) * size
                slots[number] = ledger.add(RecordKind.INODE, number, content, count=count)
                said[number] = count, content
            if turn == len(steps) // 2:
                ledger.close()
                ledger = opened(memory)  # a successor goes on with the same slots
        assert {n: (entry.count, entry.content) for n, entry in taken(memory).items()} == said
    finally:
        os.close(memory)


def test_space_is_used_again(memory: int) -> None:
    ledger = opened(memory)
    for number in range(10_000):
        ledger.set_count(ledger.add(RecordKind.REOPEN, number, b"a path"), 0)
    assert ledger._end < 1024


def test_space_of_what_is_large_is_used_again_for_other_sizes(memory: int) -> None:
    ledger = opened(memory)
    for size in range(100_000, 120_000, 10):
        ledger.set_count(ledger.add(RecordKind.GPU_COPY, 1, bytes(size)), 0)

    assert (
        len({ledger.add(RecordKind.GPU_COPY, 2, bytes(100_000)), ledger.add(RecordKind.GPU_COPY, 3, bytes(131_000))})
        == 2
    )
    assert ledger.add(RecordKind.HANDLE, 4, b"") < 400_000


def test_a_full_ledger_records_no_more(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "_CAPACITY", 4096)
    ledger = opened(memory)
    slots = [ledger.add(RecordKind.INODE, number, bytes(100)) for number in range(1, 100)]
    kept = sum(slot != UNRECORDED for slot in slots)
    assert 0 < kept < 99
    for slot in slots:
        ledger.set_count(slot, 2)
    assert {entry.count for entry in taken(memory).values()} == {2}
    assert len(taken(memory)) == kept


def test_memory_of_something_else_is_refused(memory: int) -> None:
    os.pwrite(memory, b"something else" * 100, 0)
    with pytest.raises(TakeoverError, match="another version"):
        opened(memory)


@pytest.mark.parametrize("word", [1, 63, 1 << 40, (1 << 64) - 64])
def test_a_damaged_ledger_is_refused(word: int, memory: int) -> None:
    opened(memory).add(RecordKind.INODE, 1, b"")
    with mmap.mmap(memory, 0) as view:
        view[64:72] = word.to_bytes(8, "little")
    with pytest.raises(TakeoverError, match="damaged"):
        opened(memory)


def test_what_a_server_was_writing_when_it_died_is_no_record_of_the_next(memory: int) -> None:
    ledger = opened(memory)
    ledger.add(RecordKind.INODE, 1, b"")
    slot = ledger.add(RecordKind.INODE, 2, b"{" * 300)
    with mmap.mmap(memory, 0) as view:
        view[slot : slot + 8] = bytes(8)  # the size comes last
    opened(memory).add(RecordKind.INODE, 3, b"")
    assert taken(memory).keys() == {1, 3}


def changes(ledger: Ledger, slots: list[int]) -> None:
    """What a server does all the time, without an end."""
    draw, number = random.Random(), 1000
    while True:
        ledger.set_count(slots[draw.randrange(len(slots))], draw.randrange(1, 1 << 40))
        number += 1
        ledger.set_count(ledger.add(RecordKind.REOPEN, number, bytes(draw.randrange(100))), 0)


def test_killed_at_any_moment_a_server_leaves_all_that_it_had(memory: int) -> None:
    ledger = opened(memory)
    slots = [ledger.add(RecordKind.INODE, number, bytes(number)) for number in range(1, 9)]
    for _ in range(30):
        child = os.fork()
        if child == 0:
            try:
                changes(opened(memory), slots)
            finally:
                os._exit(1)
        time.sleep(random.uniform(0.01, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = [entry for entry in taken(memory).values() if entry.kind is RecordKind.INODE]
        assert sorted(len(entry.content) for entry in found) == list(range(1, 9))


def test_a_word_is_never_seen_half_written(memory: int) -> None:
    """By another process that watches: no count is ever 0 on its way from one number to another."""
    ledger = opened(memory)
    slot = ledger.add(RecordKind.INODE, 1, b"")
    child = os.fork()
    if child == 0:
        try:
            while True:
                ledger.set_count(slot, 1)
                ledger.set_count(slot, (1 << 63) + 1)
        finally:
            os._exit(1)
    try:
        with mmap.mmap(memory, 0) as view:
            words = memoryview(view).cast("Q")
            seen = {words[slot // 8 + 3] for _ in range(300_000)}
            words.release()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert seen <= {1, (1 << 63) + 1}
