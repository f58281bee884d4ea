"""What was measured, and what follows from it."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import attrgetter

from tests.evaluation.runtime import Answer

NATIVE, SHARED, IDEAL = "MXNet", "trimsfs", "ideal"
PLACES = {
    "native download": "MXNet, downloaded from the store first",
    "native disk": "MXNet, from a local file that is not in memory",
    "native warm": "MXNet, from a local file in memory",
    "cold": "trimsfs, nothing on this host",
    "disk": "trimsfs, on the host's disk",
    "host": "trimsfs, in the host's memory",
    IDEAL: "arrays that are there when the request begins",
}
"""Where a model is when it is asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request; ``before_s`` is what had to be done before it, a download say."""

    model: str
    place: str
    before_s: float
    answer: Answer

    @property
    def load_s(self) -> float:
        """Until the parameters are arrays."""
        return self.before_s + self.answer.load_s

    @property
    def total_s(self) -> float:
        """End to end."""
        return self.before_s + self.answer.total_s


@dataclass(slots=True, kw_only=True)
class Batch:
    """Requests of some clients over a share of the models: by model, seconds and which outputs there were; most memory
    of the processes' own."""

    way: str
    share: float
    clients: int
    wall_s: float = 0.0
    latencies: dict[str, list[float]] = field(default_factory=dict)
    outputs: dict[str, list[str]] = field(default_factory=dict)
    private_bytes: int = 0

    @property
    def all_latencies(self) -> list[float]:
        return sorted(latency for latencies in self.latencies.values() for latency in latencies)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A replay under one eviction policy: mean seconds to read a model, bytes from the store and bytes read."""

    name: str
    mean_s: float
    fetched: int
    asked: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Folding:
    """Processes that have inferred at once. Bytes of all of them together: of weights that are a process's own before
    and after folding, and of all weights after it; mean seconds of an inference before and after."""

    model: str
    processes: int
    nbytes: int
    own: int
    own_folded: int
    all_folded: int
    before_s: float
    after_s: float

    @property
    def copies(self) -> float:
        """How often all processes together have the weights."""
        return self.all_folded / self.nbytes


@dataclass(slots=True)
class Results:
    """All of a run."""

    requests: list[Request] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    policies: list[Policy] = field(default_factory=list)
    foldings: list[Folding] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def median(self, model: str, place: str, value: Callable[[Request], float]) -> float | None:
        """The median over a model's requests from a place; None when there were none."""
        values = [value(request) for request in self.requests if (request.model, request.place) == (model, place)]
        return statistics.median(values) if values else None

    def ratio(self, model: str, place: str, other: str, value: Callable[[Request], float]) -> float | None:
        """How many times as much a place takes as another."""
        one, two = self.median(model, place, value), self.median(model, other, value)
        return one / two if one and two else None

    def ratios(
        self, models: Iterable[str], place: str, other: str, value: Callable[[Request], float]
    ) -> dict[str, float]:
        """The same for many models, those left out that have none."""
        found = {model: self.ratio(model, place, other, value) for model in models}
        return {model: ratio for model, ratio in found.items() if ratio is not None}

    def batch(self, way: str, share: float, clients: int) -> Batch:
        """A cell of the load. Raises StopIteration."""
        return next(batch for batch in self.batches if (batch.way, batch.share, batch.clients) == (way, share, clients))

    def differing(self) -> list[str]:
        """Models whose outputs are not the same from every place: there should be none."""
        return [model for model, digests in self.outputs().items() if len(digests) > 1]

    def outputs(self) -> dict[str, set[str]]:
        """By model, digests of what there was for one input."""
        outputs: dict[str, set[str]] = {}
        for request in self.requests:
            outputs.setdefault(request.model, set()).add(request.answer.output)
        for batch in self.batches:
            for model, digests in batch.outputs.items():
                outputs.setdefault(model, set()).update(digests)
        return outputs


load_s: Callable[[Request], float] = attrgetter("load_s")
total_s: Callable[[Request], float] = attrgetter("total_s")
private_bytes: Callable[[Request], float] = attrgetter("answer.private_bytes")


def geometric(values: Iterable[float]) -> float | None:
    """The geometric mean; None of nothing."""
    known = list(values)
    return statistics.geometric_mean(known) if known else None


def percentile(values: list[float], share: float) -> float:
    """Of sorted values, the least that so many are not above; NaN of none."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


def p99_speedups(native: Batch, other: Batch) -> float | None:
    """The geometric mean over the models of how much better the 99th percentile of latency is: the paper's measure."""
    return geometric(
        percentile(sorted(native.latencies[model]), 0.99) / percentile(sorted(latencies), 0.99)
        for model, latencies in other.latencies.items()
        if model in native.latencies
    )
