"""Uploads of a fleet's member: their order, their limit, and who is named in its place."""

from contextlib import suppress

import pytest
import trio
from trio.testing import MockClock

from trimsfs.extras.fleet.serving.uploads import (
    MANY,
    MOST_OF_CHUNK,
    PATIENCE_S,
    REFERRALS,
    BusyError,
    Uploads,
)

CHUNK = ("token", 0)
SIZE = 1000


async def start(uploads: Uploads, count: int = 1, *, chunk: tuple[str, int] = CHUNK, asker: str = "b:1") -> list[int]:
    return [await uploads.turn(chunk, SIZE, asker) for _ in range(count)]


async def holders(uploads: Uploads) -> list[str]:
    """Who is named to one more that asks for the chunk."""
    with pytest.raises(BusyError) as caught:
        await uploads.turn(CHUNK, SIZE, "z:1")
    return caught.value.holders


async def test_a_chunk_goes_to_few_at_once_and_others_go_on(autojump_clock: MockClock) -> None:
    uploads = Uploads(None)
    numbers = await start(uploads, MOST_OF_CHUNK)
    await start(uploads, MOST_OF_CHUNK, chunk=("token", 1))
    began = trio.current_time()
    assert await holders(uploads) == []
    assert trio.current_time() - began == PATIENCE_S
    uploads.ended(numbers[0], SIZE, complete=False)
    await start(uploads)
    assert uploads.refused == 1


async def test_who_has_got_a_chunk_is_named_to_some_others(autojump_clock: MockClock) -> None:
    uploads = Uploads(None)
    (number,) = await start(uploads, asker="first:1")
    await start(uploads, MOST_OF_CHUNK - 1)
    uploads.ended(number, SIZE, complete=True)
    await start(uploads)
    for _ in range(REFERRALS):
        assert await holders(uploads) == ["first:1"]
    assert await holders(uploads) == []


async def test_a_host_that_sends_much_leaves_a_chunk_to_who_has_got_it(autojump_clock: MockClock) -> None:
    uploads = Uploads(None)
    (number,) = await start(uploads, asker="first:1")
    uploads.ended(number, SIZE, complete=True)
    for other in range(MANY):
        await start(uploads, chunk=("token", other + 1))
    assert await holders(uploads) == ["first:1"]
    await start(uploads, chunk=("token", MANY + 1))
    await start(uploads, asker="first:1")  # it has lost the chunk
    await start(uploads)


@pytest.mark.parametrize(("sent", "complete"), [(SIZE, False), (SIZE - 1, True), (0, False)])
async def test_who_has_got_a_part_is_named_to_nobody(autojump_clock: MockClock, sent: int, complete: bool) -> None:
    uploads = Uploads(None)
    (number,) = await start(uploads)
    uploads.ended(number, sent, complete=complete)
    await start(uploads, MOST_OF_CHUNK)
    assert await holders(uploads) == []
    assert (uploads.count, uploads.bytes) == (0, sent)


async def test_who_waits_is_sent_on_as_soon_as_another_has_the_chunk(autojump_clock: MockClock) -> None:
    uploads, named = Uploads(None), list[str]()
    numbers = await start(uploads, MOST_OF_CHUNK, asker="first:1")

    async def wait() -> None:
        try:
            await uploads.turn(CHUNK, SIZE, "z:1")
        except BusyError as busy:
            named.extend(busy.holders)
        else:
            named.append("me")

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait)
        await trio.sleep(1)
        uploads.ended(numbers[0], SIZE, complete=True)
    assert sorted(named) == ["first:1", "first:1", "me"]
    assert trio.current_time() < PATIENCE_S


async def test_a_turn_is_not_lost_with_who_hangs_up(autojump_clock: MockClock) -> None:
    uploads, got = Uploads(None), list[str]()
    numbers = await start(uploads, MOST_OF_CHUNK)

    async def wait(name: str, scope: trio.CancelScope) -> None:
        with scope:
            await uploads.turn(CHUNK, SIZE, f"{name}:1")
            got.append(name)

    first, second = trio.CancelScope(), trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "first", first)
        await trio.sleep(0.1)
        nursery.start_soon(wait, "second", second)
        await trio.sleep(0.1)
        first.cancel()
        uploads.ended(numbers[0], 0, complete=False)
        await trio.sleep(0.1)
        assert got == ["second"]


async def test_all_uploads_together_stay_within_the_limit(autojump_clock: MockClock) -> None:
    uploads, began, turns = Uploads(10 * SIZE), trio.current_time(), list[float]()

    async def upload(number: int) -> None:
        await uploads.turn(("token", number), SIZE, "b:1")
        turns.append(trio.current_time() - began)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(upload, number)
    assert turns == pytest.approx([number / 10 for number in range(20)])


async def test_who_waits_for_the_limit_counts_among_the_few_at_once(autojump_clock: MockClock) -> None:
    uploads, given = Uploads(2 * SIZE), list[int]()

    async def upload() -> None:
        with suppress(BusyError):
            given.append(await uploads.turn(CHUNK, SIZE, "b:1"))

    async with trio.open_nursery() as nursery:
        for _ in range(MOST_OF_CHUNK + 3):
            nursery.start_soon(upload)
    assert len(given) == MOST_OF_CHUNK
    uploads.ended(given[0], SIZE, complete=False)
    await start(uploads, chunk=("token", 1))
    with trio.move_on_after(0.1):
        await start(uploads)  # it hangs up while it waits for the limit
    await start(uploads)


async def test_who_would_wait_too_long_is_told_that_this_host_is_busy(autojump_clock: MockClock) -> None:
    uploads = Uploads(SIZE)
    for number in range(int(PATIENCE_S) + 1):
        with trio.move_on_after(0):
            await uploads.turn(("token", number), SIZE, "b:1")
    assert await holders(uploads) == []
    assert trio.current_time() < PATIENCE_S


async def test_a_lost_report_takes_a_place_for_half_a_minute_at_most(autojump_clock: MockClock) -> None:
    uploads = Uploads(None)
    await start(uploads, MOST_OF_CHUNK)
    await trio.sleep(31)
    await start(uploads, MOST_OF_CHUNK)


async def test_a_report_of_an_earlier_servers_upload_ends_none_of_this_one(autojump_clock: MockClock) -> None:
    earlier, uploads = Uploads(None), Uploads(None)
    numbers = await start(earlier, MOST_OF_CHUNK)
    await start(uploads, MOST_OF_CHUNK)
    for number in numbers:
        uploads.ended(number, SIZE, complete=True)
    assert await holders(uploads) == []


async def test_chunks_that_a_slow_upload_kept_are_forgotten_after_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimsfs.extras.fleet.serving.uploads.KNOWN_CHUNKS", 2)
    uploads = Uploads(None)
    (slow,) = await start(uploads)
    for chunk in range(1, 10):
        (number,) = await start(uploads, chunk=("token", chunk))
        uploads.ended(number, SIZE, complete=True)
    uploads.ended(slow, SIZE, complete=True)
    assert list(uploads._chunks) == [("token", 9), CHUNK]
