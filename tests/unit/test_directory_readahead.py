"""Which small files are fetched before they are asked for."""

from trimsfs.namespace.listing import NonObject
from trimsfs.prefetch.directory_readahead import (
    FIRST_WINDOW,
    LAST_WINDOW,
    LEAST_WINDOW,
    LOOKED_AT,
    SMALL,
    DirectoryReadahead,
)
from trimsfs.types import Generation


def generation(name: bytes, size: int = 1000, etag: str = "e") -> Generation:
    return Generation(key=name.decode(), etag=etag, size=size, modified_ns=0)


def directory(count: int, size: int = 1000) -> dict[bytes, object]:
    names = [f"{number:05}".encode() for number in range(count)]
    return {name: generation(name, size) for name in names}


def opened(
    readahead: DirectoryReadahead, entries: dict[bytes, object], number: int, *, here: bool = False
) -> list[str]:
    name = f"{number:05}".encode()
    wanted = readahead.record_open(name, generation(name), list(entries), entries, here=here)
    return [generation.key for generation in wanted]


def numbered(start: int, stop: int) -> list[str]:
    return [f"{number:05}" for number in range(start, stop)]


def test_the_first_announces_those_that_follow_it() -> None:
    assert opened(DirectoryReadahead(), directory(100), 1) == numbered(2, 2 + FIRST_WINDOW)


def test_after_the_last_come_the_first() -> None:
    assert opened(DirectoryReadahead(), directory(10), 7) == ["00008", "00009", *numbered(0, 7)]


def test_a_directory_read_in_order_is_asked_for_in_growing_steps_and_each_file_once() -> None:
    entries, readahead = directory(3000), DirectoryReadahead()
    steps = [step for number in range(3000) if (step := opened(readahead, entries, number))]
    fetched = [name for step in steps for name in step]
    assert len(fetched) == len(set(fetched)) == 2999
    assert [len(step) for step in steps][:6] == [32, 64, 128, 256, 512, 512]
    assert max(map(len, steps)) == LAST_WINDOW


def test_the_next_step_begins_before_the_last_is_used_up() -> None:
    entries, readahead = directory(1000), DirectoryReadahead()
    opened(readahead, entries, 0)
    first_met = next(number for number in range(1, 1000) if opened(readahead, entries, number))
    assert first_met == 1 + FIRST_WINDOW // 2 - 1


def test_a_step_has_no_more_bytes_than_a_quarter_of_its_largest() -> None:
    entries = directory(100, SMALL)
    assert len(opened(DirectoryReadahead(), entries, 0)) == FIRST_WINDOW // 4


def test_files_opened_here_and_there_are_guessed_at_less_and_less() -> None:
    entries, readahead = directory(100_000), DirectoryReadahead()
    sizes = [len(opened(readahead, entries, (number * 7919) % 100_000)) for number in range(20)]
    assert sizes[0] == FIRST_WINDOW
    assert sizes[-1] == LEAST_WINDOW


def test_what_was_opened_before_or_is_here_changes_nothing() -> None:
    entries, readahead = directory(100), DirectoryReadahead()
    opened(readahead, entries, 0)
    window = readahead.window
    assert [opened(readahead, entries, 0) for _ in range(100)] == [[]] * 100
    assert opened(readahead, entries, 90, here=True) == []
    assert readahead.window == window


def test_what_is_gone_is_announced_again() -> None:
    entries, readahead = directory(20), DirectoryReadahead()
    opened(readahead, entries, 0)
    for name in entries:
        readahead.forget(name)
    assert opened(readahead, entries, 5) == [*numbered(6, 20), *numbered(0, 5)]


def test_a_listing_announces_the_first_of_a_directory_of_small_files() -> None:
    entries, readahead = directory(100), DirectoryReadahead()
    first = readahead.record_listing(list(entries), entries)
    assert [generation.key for generation in first] == numbered(0, FIRST_WINDOW)
    assert readahead.record_listing(list(entries), entries) == []
    assert opened(readahead, entries, 0) == []


def test_a_listing_of_large_files_announces_nothing() -> None:
    entries = directory(3, SMALL + 1) | {b"config": generation(b"config")}
    assert DirectoryReadahead().record_listing(list(entries), entries) == []


def test_large_empty_and_unknown_entries_are_left_out() -> None:
    entries: dict[bytes, object] = {
        b"00000": generation(b"00000"),
        b"00001": generation(b"00001"),
        b"dir": NonObject.DIRECTORY,
        b"empty": generation(b"empty", size=0),
        b"large": generation(b"large", size=SMALL + 1),
        b"limit": generation(b"limit", size=SMALL),
    }
    readahead = DirectoryReadahead()
    large = generation(b"large", size=SMALL + 1)
    assert readahead.record_open(b"large", large, list(entries), entries) == []
    assert opened(readahead, entries, 1) == ["limit", "00000"]


def test_few_names_are_looked_at_however_many_there_are() -> None:
    entries = directory(LOOKED_AT + 10, SMALL + 1) | {b"zzzzz": generation(b"zzzzz")}
    assert opened(DirectoryReadahead(), entries, 0) == []
    assert opened(DirectoryReadahead(), entries, 100) == ["zzzzz"]


def test_a_replaced_file_is_new() -> None:
    entries, readahead = directory(3), DirectoryReadahead()
    for number in range(3):
        opened(readahead, entries, number)
    entries[b"00000"], entries[b"00002"] = generation(b"00000", etag="new"), generation(b"00002", etag="new")
    wanted = readahead.record_open(b"00000", generation(b"00000", etag="new"), list(entries), entries)
    assert [generation.key for generation in wanted] == ["00002"]
