"""By which power what was measured grows: the exponent of a fit to its points, both axes logarithmic."""

import math
from collections.abc import Callable, Sequence
from statistics import linear_regression

from tests.benchmarks.results import TRIMSFS, Key, Results, Series
from tests.benchmarks.scaling.growths import CACHE, FILES, FLAT, MOUNTS, OBJECTS, READERS, SIZE

GROUPS = (OBJECTS, FLAT, MOUNTS, CACHE, FILES, READERS, SIZE)
Points = list[tuple[int, float]]
Formula = Callable[[Results], float | None]


def numbers(results: Results, group: str, name: str) -> dict[int, Series]:
    """The series of a measurement by how many there are of what grows."""
    series = {case: results.series[Key(group, name, case, TRIMSFS)] for case in results.cases(group, name)}
    return {int(case.replace(",", "")): series[case] for case in series}


def points(results: Results, group: str, name: str) -> Points:
    """How many there are of what grows, and the median of what was measured of them, in order."""
    found = numbers(results, group, name)
    return [(number, median) for number in sorted(found) if (median := found[number].median) is not None]


def slope(measured: Points) -> float | None:
    """The exponent of all points; None where there are less than two above zero."""
    logarithms = [(math.log(number), math.log(value)) for number, value in measured if value > 0]
    if len(logarithms) < 2:
        return None
    return linear_regression(*zip(*logarithms, strict=True)).slope


def last_slope(measured: Points) -> float | None:
    """The exponent between the last two points: of what grows late, more than that of all."""
    return slope(measured[-2:])


def steepest(results: Results) -> float | None:
    """The largest exponent of anything."""
    slopes = [slope(points(results, group, name)) for group in GROUPS for name in names(results, group)]
    return max((exponent for exponent in slopes if exponent is not None), default=None)


def names(results: Results, group: str) -> Sequence[str]:
    """What was measured in a group."""
    return list(dict.fromkeys(key.name for key in results.series if key.group == group))


def at(group: str, name: str, number: int) -> Formula:
    """The point of this number."""
    return lambda results: dict(points(results, group, name)).get(number)


def last_by_first(group: str, name: str) -> Formula:
    """The last point / the first."""

    def formula(results: Results) -> float | None:
        values = [value for _, value in points(results, group, name)]
        return values[-1] / values[0] if len(values) > 1 else None

    return formula
