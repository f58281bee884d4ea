"""The table of promises in docs/stores.md is what the suite shows, and gives a reason for all that it does not."""

from tests.contract.promises import NOTES, PAGE, PROMISES, STORES, collected, written


def test_the_page_has_the_table_that_the_suite_shows() -> None:
    shown = collected()
    assert {promise for _, promise in shown} <= PROMISES.keys()
    unexplained = [
        (store, promise) for store in STORES for promise in PROMISES if not {(store, promise)} & (shown.keys() | NOTES)
    ]
    assert unexplained == []
    assert PAGE.read_text() == written(PAGE.read_text(), shown), "run `python -m tests.contract.promises`"
