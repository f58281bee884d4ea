"""Histograms of durations: how many fell into each bucket, and their sum, as Prometheus has them."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

BOUNDS_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""The buckets' upper bounds, from an open of a resident file to a store that barely answers; a last one has none."""


class Series:
    """The durations of one value of the label."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum += seconds


class Histogram:
    """Durations in seconds, apart for each value of a *label* if there is one; *values* are shown before they occur."""

    __slots__ = ("_series", "label")

    def __init__(self, label: str | None = None, values: Iterable[str] = ()) -> None:
        self.label = label
        self._series = {value: Series() for value in ([""] if label is None else values)}

    def observe(self, seconds: float, value: str = "") -> None:
        """Count a duration, under a value of the label."""
        self.series(value).observe(seconds)

    def series(self, value: str) -> Series:
        """The durations of a value of the label."""
        series = self._series.get(value)
        if series is None:
            series = self._series[value] = Series()
        return series

    def buckets(self) -> Iterator[tuple[str, list[tuple[str, float]], float]]:
        """For each value of the label, the buckets' upper bounds with how many were at most as long, and the sum."""
        for value, series in self._series.items():
            total, cumulative = 0, []
            for bound, count in zip([*map(str, BOUNDS_S), "+Inf"], series.counts, strict=True):
                total += count
                cumulative.append((bound, float(total)))
            yield value, cumulative, series.sum
