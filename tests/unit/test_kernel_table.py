"""The table of kernels in the docs: it is whole, and no feature in it has failed."""

import itertools

from tests.machines.hosts import KINDS
from tests.machines.kernel_table import BEGIN, DOCUMENT, END, Feature, Result, table

ROWS_WITHOUT_FEATURE = {"", "---", "kernel", "run on"}


def test_the_last_result_counts_and_what_did_not_run_is_told() -> None:
    results = [
        Result("new", "6.12.1-cloud", "2026-12-01", Feature.READS, "failed"),
        Result("old", "6.1.0-9", "2026-12-01", Feature.READS, "yes"),
        Result("new", "6.12.1-cloud", "2026-12-02", Feature.READS, "yes"),
        Result("new", "6.12.1-cloud", "2026-12-02", Feature.BOOT, "yes"),
    ]
    lines = table(results).splitlines()
    assert lines[:3] == ["|  | old | new |", "| --- | --- | --- |", "| kernel | 6.1.0-9 | 6.12.1-cloud |"]
    assert f"| {Feature.READS} | yes | yes |" in lines
    assert f"| {Feature.BOOT} | not run | yes |" in lines
    assert lines[-1] == "| run on | 2026-12-01 | 2026-12-02 |"


def test_the_docs_have_each_host_and_each_feature() -> None:
    written = DOCUMENT.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in written.split("\n") if line]
    assert set(rows[0]) == {"", *map(str, KINDS)}
    assert {row[0] for row in rows} == set(Feature) | ROWS_WITHOUT_FEATURE
    assert not {"failed", "not run"} & set(itertools.chain.from_iterable(rows))
