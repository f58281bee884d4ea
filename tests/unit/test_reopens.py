"""Opens that are answered ESTALE: once each, whichever server did it."""

from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.opening.reopens import REOPENED_WITHIN_S, Reopens


def reopens(ledger: Ledger) -> Reopens:
    """Those of one server; none keeps a blob."""
    return Reopens(ledger, release=lambda _blob: None)


async def test_an_open_is_sent_back_once_whichever_server_did_it(ledger: Callable[[], Ledger]) -> None:
    assert reopens(ledger()).request(5, "dir/odd \udcff")
    after = reopens(ledger())
    after.restore()
    assert not after.request(5, "dir/odd \udcff")
    assert after.request(6, "dir/odd \udcff")
    assert after.arrived(5, "dir/odd \udcff")
    after.completed(5, "dir/odd \udcff")
    assert after.request(5, "dir/odd \udcff")


@pytest.mark.parametrize("late_s", [0.0, 30.0])
async def test_a_server_that_dies_before_it_answers_leaves_the_next_to_know_what_was_sent_back(
    ledger: Callable[[], Ledger], autojump_clock: MockClock, late_s: float
) -> None:
    del autojump_clock
    first = reopens(ledger())
    assert first.request(5, "dir/file")
    with first.under_way(5, "dir/file"):
        await trio.sleep(late_s)
        assert first.request(6, "dir/other")  # which forgets what is old
        assert not first.request(5, "dir/file")
    assert first.arrived(5, "dir/file")
    after = reopens(ledger())
    after.restore()
    assert not after.request(5, "dir/file")


async def test_what_does_not_come_back_is_forgotten(ledger: Callable[[], Ledger], autojump_clock: MockClock) -> None:
    del autojump_clock
    first = reopens(ledger())
    assert first.request(5, "dir/file")
    assert first.arrived(5, "dir/file")  # and nobody takes its handle
    assert not first.request(5, "dir/file")
    await trio.sleep(REOPENED_WITHIN_S)
    assert first.request(6, "dir/file")
    assert [record.number for record in ledger().inherited(RecordKind.REOPEN)] == [6]
