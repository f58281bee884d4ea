import random

import pytest

from trimsfs.fetch.bypass import STREAMS, WINDOW, AccessPattern, new_ends

MIB = 1 << 20
PAGE = 4096
FILE = 100_000 * MIB


def read(pattern: AccessPattern, size: int, *starts: int) -> AccessPattern:
    for start in starts:
        pattern.record(start, start + size)
    return pattern


def at_random(count: int, seed: int = 1) -> list[int]:
    return [random.Random(seed + number).randrange(FILE // PAGE) * PAGE for number in range(count)]


def test_random_reads_show_after_a_few() -> None:
    pattern = read(AccessPattern(), PAGE, *at_random(WINDOW - 1))
    assert not pattern.random
    assert read(pattern, PAGE, *at_random(1, seed=50)).random


def streams(count: int) -> list[int]:
    """Where programs read that take turns, each in order."""
    begins = at_random(count)
    return [begin + number * MIB for number in range(4) for begin in begins]


@pytest.mark.parametrize(
    "starts",
    [
        pytest.param([number * MIB for number in range(40)], id="one after the other"),
        pytest.param([(number ^ 1) * MIB for number in range(40)], id="each second one before its predecessor"),
        pytest.param(streams(4), id="by several programs"),
        pytest.param(streams(STREAMS), id="by many programs"),
    ],
)
def test_reads_in_order_are_not_random(starts: list[int]) -> None:
    assert not read(AccessPattern(), MIB, *starts).random


def test_random_reads_may_be_followed_by_reads_in_order_and_the_other_way_round() -> None:
    pattern = read(AccessPattern(), PAGE, *at_random(20))
    assert pattern.random
    assert not read(pattern, MIB, *range(0, WINDOW * MIB, MIB)).random
    assert read(pattern, PAGE, *at_random(WINDOW, seed=90)).random


def test_a_read_that_neither_goes_on_nor_begins_the_file_is_a_jump() -> None:
    pattern = AccessPattern()
    jumped = [read(pattern, MIB, start * MIB).jumped for start in (0, 500, 501, 502, 0, 900, 503)]
    assert jumped == [False, True, False, False, False, True, False]


def test_a_chunk_of_which_much_is_read_is_dense() -> None:
    pattern = AccessPattern()
    told = [pattern.dense(3, PAGE, chunk_size=8 * PAGE) for _ in range(4)]
    assert told == [False, False, False, True]
    assert not pattern.dense(4, PAGE, chunk_size=8 * PAGE)


def test_many_programs_that_each_read_their_own_part_are_in_order() -> None:
    others = new_ends()
    patterns = [AccessPattern(others) for _ in range(2 * STREAMS)]
    for step in range(20):
        for number, pattern in enumerate(patterns):
            read(pattern, MIB, number * FILE // len(patterns) + step * MIB)
    assert not any(pattern.random or pattern.jumped for pattern in patterns)


def test_who_reads_at_random_beside_one_that_reads_in_order_is_seen_and_the_other_is_not() -> None:
    others = new_ends()
    one, other = AccessPattern(others), AccessPattern(others)
    for number, start in enumerate(at_random(40)):
        read(one, MIB, number * MIB)
        read(other, PAGE, start)
    assert (one.random, other.random) == (False, True)


def test_reads_of_what_is_here_say_nothing_of_the_others() -> None:
    pattern = AccessPattern()
    for number, start in enumerate(at_random(40)):
        pattern.passed(number * PAGE, (number + 1) * PAGE)
        read(pattern, PAGE, start)
    assert pattern.random
