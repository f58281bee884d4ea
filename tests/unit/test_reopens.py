"""Opens that the kernel makes once more, as they were answered ESTALE."""

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.opening.reopens import REOPENED_WITHIN_S, Reopens


async def test_a_reopen_is_expected_once_whichever_server_asked_for_it(ledger: Callable[[], Ledger]) -> None:
    Reopens(ledger()).request(5, "dir/odd \udcff")
    after = Reopens(ledger())
    after.restore()
    assert after.expected(5, "dir/odd \udcff")
    assert not after.expected(6, "dir/odd \udcff")
    after.completed(5, "dir/odd \udcff")
    assert not after.expected(5, "dir/odd \udcff")
    assert ledger().inherited(RecordKind.REOPEN) == []


@pytest.mark.parametrize("late_s", [0.0, 30.0])
async def test_a_reopen_under_way_stays_expected_also_by_the_next_server(
    ledger: Callable[[], Ledger], autojump_clock: MockClock, late_s: float
) -> None:
    del autojump_clock
    first = Reopens(ledger())
    first.request(5, "dir/file")
    with first.under_way(5, "dir/file"):
        await trio.sleep(late_s)
        first.request(6, "dir/other")  # which forgets what is old
        assert first.expected(5, "dir/file")
    after = Reopens(ledger())
    after.restore()
    assert after.expected(5, "dir/file")


async def test_what_does_not_come_back_is_forgotten(ledger: Callable[[], Ledger], autojump_clock: MockClock) -> None:
    del autojump_clock
    first = Reopens(ledger())
    first.request(5, "dir/file")
    await trio.sleep(REOPENED_WITHIN_S)
    first.request(6, "dir/file")
    assert [record.number for record in ledger().inherited(RecordKind.REOPEN)] == [6]
