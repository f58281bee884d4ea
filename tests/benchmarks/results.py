"""What was measured: samples by group, name, case and contender."""

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

NATIVE, TRIMSFS, RCLONE, JUICEFS, S3FS, GETS = "native", "trimsfs", "rclone", "JuiceFS", "s3fs", "GETs"
PEERS = (RCLONE, JUICEFS, S3FS)
RUNAI = "Run:ai's streamer"
BYTES = frozenset(
    {
        "peak memory",
        "server memory",
        "device memory of the model",
        "device memory of a context",
        "device memory of the server's context",
        "PSS of the processes",
        "peak of one process",
        "less MemAvailable",
        "bytes fetched",
        "memory of all its processes",
        "private memory",
    }
)
"""Names of what is measured in bytes."""
RATES = frozenset({"fill", "fetch"})
"""Names of what is measured in bytes a second."""
SHARES = frozenset(
    {
        "bytes fetched / file",
        "page cache / file",
        "PSS of all / file",
        "passed through / open files",
        "wakeups a second at rest",
        "descriptors of the server",
        "rate of what computes / alone",
    }
)
"""Names of what is a ratio or a count. What is in none of these sets is seconds."""


class Key(NamedTuple):
    """What a series of samples is of."""

    group: str
    name: str
    case: str
    contender: str


@dataclass(slots=True)
class Series:
    """Samples, in the unit that goes by their name: see `BYTES`, `RATES` and `SHARES`.

    *note* says why there are none, or no more.
    """

    samples: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float | None:
        """The median of the samples, if there are any."""
        return statistics.median(self.samples) if self.samples else None


@dataclass(slots=True)
class Results:
    """All series, in the order they were begun, and what failed."""

    series: dict[Key, Series] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def add(self, key: Key, *samples: float) -> None:
        """Add samples to a series."""
        self.series.setdefault(key, Series()).samples.extend(samples)

    def note(self, key: Key, text: str) -> None:
        """Say why a series has no more samples."""
        self.series.setdefault(key, Series()).note = text

    def median(self, group: str, name: str, case: str, contender: str) -> float | None:
        """The median of a series; None when there are no samples."""
        series = self.series.get(Key(group, name, case, contender))
        return series.median if series else None

    def groups(self) -> list[str]:
        """The groups, in order."""
        return _unique(key.group for key in self.series)

    def rows(self, group: str) -> Iterator[tuple[str, str, dict[str, Series]]]:
        """Name, case and the series by contender, for each measurement of a group."""
        rows: dict[tuple[str, str], dict[str, Series]] = {}
        for key, series in self.series.items():
            if key.group == group:
                rows.setdefault((key.name, key.case), {})[key.contender] = series
        for (name, case), by_contender in rows.items():
            yield name, case, by_contender

    def cases(self, group: str, name: str) -> list[str]:
        """The cases of a measurement, in order."""
        return _unique(key.case for key in self.series if (key.group, key.name) == (group, name))


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
