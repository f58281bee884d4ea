"""The numbers of this part that budgets bound."""

from collections.abc import Callable, Iterator, Sequence

from tests.benchmarks.models.cases import FILE_MAPPED, FILE_READ, LLAMA
from tests.benchmarks.models.loads import GROUP, INFER, SUM
from tests.benchmarks.models.partial_reads import WIRE
from tests.benchmarks.results import GETS, NATIVE, PEERS, TRIMSFS, Results

Formula = Callable[[Results], float | None]
DISTANT = ", distant"


def beside(name: str, case: str, others: Sequence[str], *, distant: bool | None = None) -> Formula:
    """trimsfs / the least of the others, from the worst of the near endpoints, the distant ones or all of them."""

    def formula(results: Results) -> float | None:
        return max(_ratios(results, name, case, others, distant), default=None)

    return formula


def one_file(results: Results) -> float | None:
    """Speed of trimsfs / speed of the fastest other mount, read or mapped, from the worst endpoint."""
    ratios = [
        1 / ratio for case in (FILE_READ, FILE_MAPPED) for ratio in _ratios(results, SUM, case, PEERS, distant=None)
    ]
    return min(ratios, default=None)


def beside_the_wire(results: Results) -> float | None:
    """From the worst distant endpoint: time of the first load and inference, less that of an inference with everything
    in memory, / time of the bytes on the wire."""
    ratios = []
    for group in _groups(results, distant=True):
        cold = results.median(group, SUM, LLAMA, TRIMSFS)
        inferring = results.median(group, INFER, LLAMA, NATIVE)
        wire = results.median(group, WIRE, LLAMA, GETS)
        if cold and inferring and wire:
            ratios.append((cold - inferring) / wire)
    return max(ratios, default=None)


def _ratios(results: Results, name: str, case: str, others: Sequence[str], distant: bool | None) -> Iterator[float]:
    for group in _groups(results, distant):
        ours = results.median(group, name, case, TRIMSFS)
        theirs = [median for other in others if (median := results.median(group, name, case, other))]
        if ours and theirs:
            yield ours / min(theirs)


def _groups(results: Results, distant: bool | None) -> list[str]:
    return [
        group
        for group in results.groups()
        if group.startswith(GROUP) and (distant is None or group.endswith(DISTANT) == distant)
    ]
