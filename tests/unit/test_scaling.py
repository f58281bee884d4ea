"""The arithmetic of the scaling study, and the objects that exist only in the endpoint's answers."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from tests.benchmarks.budgets import verdicts
from tests.benchmarks.report import tables
from tests.benchmarks.results import TRIMSFS, Key, Results
from tests.benchmarks.scaling import growths, plots, slopes, study
from tests.services.buckets import copied, copy_name, uploaded
from tests.services.fast import start_fast

pytestmark = pytest.mark.timeout(60)
NUMBERS = (1_000, 10_000, 100_000, 1_000_000)


def results_of(name: str, value: Callable[[int], float]) -> Results:
    results = Results()
    for number in reversed(NUMBERS):
        results.add(Key(growths.OBJECTS, name, f"{number:,}", TRIMSFS), value(number))
    return results


@pytest.mark.parametrize("power", [0, 0.5, 1, 2])
def test_a_slope_is_the_power_by_which_it_grows(power: float) -> None:
    points = slopes.points(results_of("n", lambda number: 7 * number**power), growths.OBJECTS, "n")

    assert [number for number, _ in points] == list(NUMBERS)
    assert slopes.slope(points) == pytest.approx(power, abs=1e-9)


def test_what_grows_late_is_seen_at_the_end() -> None:
    late = slopes.points(results_of("n", lambda number: 1e5 + number), growths.OBJECTS, "n")
    assert (slopes.slope(late) or 1) < 0.5 < (slopes.last_slope(late) or 0)
    assert slopes.slope([]) is slopes.slope([(1, 2.0)]) is slopes.slope([(1, 2.0), (10, 0.0)]) is None


def test_what_grows_is_a_row_for_each_measurement_and_a_plot(tmp_path: Path) -> None:
    results = results_of(study.OPEN, lambda number: 5e-5 if number < 10_000 else 6e-5)
    results.add(Key(growths.OBJECTS, study.MEMORY, "1,000,000", TRIMSFS), 400 << 20)
    (_, table) = tables(results)

    assert list(table.headings) == ["", "1,000", "10,000", "100,000", "1,000,000", "slope", "at the end"]
    assert list(table.rows) == [
        [study.OPEN, "50 µs", "60 µs", "60 µs", "60 µs", "0.02", "0.00"],
        [study.MEMORY, "-", "-", "-", "400 MiB", "-", "-"],
    ]
    measured = {budget.name: (value, budget.word(value)) for budget, value in verdicts(results)}
    assert measured["open of a resident file among many"][0] == pytest.approx(1.2)
    assert measured["memory for a million names"][1] == "missed"
    assert measured["growth"][1] == "met"
    assert measured["trimsfs mount"][1] == "not measured"
    (drawn,) = plots.draw(results, tmp_path)
    assert f"{study.OPEN}: 0.02" in drawn.read_text()


def test_the_endpoint_serves_copies_that_are_no_files(tmp_path: Path) -> None:
    directory = tmp_path / "bucket/many"
    directory.mkdir(parents=True)
    file = directory / "file"
    file.write_bytes(b"content")
    uploaded(file)
    copied(directory, file, 1500)
    with start_fast(tmp_path) as server, contextlib.closing(server.client()) as client:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix="many/", Delimiter="/")
        items = [item for page in pages for item in page["Contents"]]
        keys = [item["Key"] for item in items]
        assert keys == [*(f"many/{copy_name(number)}" for number in range(1500)), "many/file"]
        answer = client.get_object(Bucket="bucket", Key=keys[1499])
        assert answer["Body"].read() == b"content"
        assert answer["ETag"] == items[1499]["ETag"] == items[-1]["ETag"]
        for absent in (copy_name(1500), "1", "-000001", "other/0000000"):
            with pytest.raises(ClientError, match="NoSuchKey"):
                client.get_object(Bucket="bucket", Key=f"many/{absent}")
    assert os.listdir(directory) == ["file"]
