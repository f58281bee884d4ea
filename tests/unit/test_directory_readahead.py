"""Which small files are fetched before they are asked for."""

from trimsfs.namespace.directory import NonObject
from trimsfs.prefetch.directory_readahead import FIRST_WINDOW, LAST_WINDOW, LEAST_WINDOW, SMALL, DirectoryReadahead
from trimsfs.types import Generation


def generation(name: bytes, size: int = 1000, etag: str = "e") -> Generation:
    return Generation(key=name.decode(), etag=etag, size=size, modified_ns=0)


def directory(count: int) -> dict[bytes, object]:
    names = [f"{number:05}".encode() for number in range(count)]
    return {name: generation(name) for name in names}


def opened(readahead: DirectoryReadahead, entries: dict[bytes, object], number: int) -> list[str]:
    name = f"{number:05}".encode()
    return [wanted.key for wanted in readahead.record_open(name, generation(name), entries)]


def test_one_file_alone_tells_nothing() -> None:
    assert opened(DirectoryReadahead(), directory(100), 0) == []


def test_the_second_announces_those_that_follow_it() -> None:
    entries, readahead = directory(100), DirectoryReadahead()
    opened(readahead, entries, 0)
    assert opened(readahead, entries, 1) == [f"{number:05}" for number in range(2, 2 + FIRST_WINDOW)]


def test_after_the_last_come_the_first() -> None:
    entries, readahead = directory(10), DirectoryReadahead()
    opened(readahead, entries, 4)
    assert opened(readahead, entries, 7) == ["00008", "00009", "00000", "00001", "00002", "00003", "00005", "00006"]


def test_a_directory_read_in_order_is_asked_for_in_growing_steps_and_each_file_once() -> None:
    entries, readahead = directory(3000), DirectoryReadahead()
    steps = [step for number in range(3000) if (step := opened(readahead, entries, number))]
    fetched = [name for step in steps for name in step]
    assert len(fetched) == len(set(fetched)) == 2998
    assert [len(step) for step in steps][:6] == [32, 64, 128, 256, 512, 512]
    assert max(map(len, steps)) == LAST_WINDOW


def test_the_next_step_begins_before_the_last_is_used_up() -> None:
    entries, readahead = directory(1000), DirectoryReadahead()
    opened(readahead, entries, 0)
    opened(readahead, entries, 1)
    first_met = next(number for number in range(2, 1000) if opened(readahead, entries, number))
    assert first_met == 2 + FIRST_WINDOW // 2 - 1


def test_files_opened_here_and_there_are_guessed_at_less_and_less() -> None:
    entries, readahead = directory(100_000), DirectoryReadahead()
    sizes = [len(opened(readahead, entries, (number * 7919) % 100_000)) for number in range(20)]
    assert sizes[1] == FIRST_WINDOW
    assert sizes[-1] == LEAST_WINDOW


def test_what_was_opened_before_changes_nothing() -> None:
    entries, readahead = directory(100), DirectoryReadahead()
    opened(readahead, entries, 0)
    opened(readahead, entries, 1)
    window = readahead.window
    assert [opened(readahead, entries, 1) for _ in range(100)] == [[]] * 100
    assert readahead.window == window


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
    assert readahead.record_open(b"large", generation(b"large", size=SMALL + 1), entries) == []
    opened(readahead, entries, 0)
    assert opened(readahead, entries, 1) == ["limit"]


def test_a_replaced_file_is_new() -> None:
    entries, readahead = directory(3), DirectoryReadahead()
    for number in range(3):
        opened(readahead, entries, number)
    entries[b"00000"], entries[b"00002"] = generation(b"00000", etag="new"), generation(b"00002", etag="new")
    assert [wanted.key for wanted in readahead.record_open(b"00000", generation(b"00000", etag="new"), entries)] == [
        "00002"
    ]
