"""The numbers of this part that budgets bound."""

from collections.abc import Callable, Iterator, Sequence

from tests.benchmarks.models.cases import FILE_READ, LLAMA
from tests.benchmarks.models.loads import INFER, RATE, SUM, group
from tests.benchmarks.models.partial_reads import BESIDE, WHOLE_HEADER, WIRE
from tests.benchmarks.models.places import BUSY_HTTP, BUSY_HTTPS, DISTANT, HTTPS, SLOW
from tests.benchmarks.results import GETS, NATIVE, S3FS, TRIMSFS, Results

Formula = Callable[[Results], float | None]


def beside(name: str, cases: Sequence[str], others: Sequence[str], *places: str) -> Formula:
    """trimsfs / the least of the others, of the worst of these cases and places."""

    def formula(results: Results) -> float | None:
        return max(_ratios(results, name, cases, others, places), default=None)

    return formula


def ours(name: str, case: str, place: str) -> Formula:
    """The median of trimsfs."""
    return lambda results: results.median(group(place), name, case, TRIMSFS)


def neighbours(results: Results) -> float | None:
    """How fast programs compute beside trimsfs / beside s3fs, of the worst of what is loaded on a busy host."""
    ratios = _ratios(results, RATE, (FILE_READ, LLAMA), (S3FS,), (BUSY_HTTPS, BUSY_HTTP))
    return min(ratios, default=None)


def header_beside_one_get(results: Results) -> float | None:
    """From the worse of near and distant: time of a shard's header / time of one GET of as many bytes."""
    cases = results.cases(group(HTTPS), WHOLE_HEADER) + results.cases(group(DISTANT), WHOLE_HEADER)
    return beside(WHOLE_HEADER, cases, (GETS,), HTTPS, DISTANT)(results)


def first_bytes_while_fetching(results: Results) -> float | None:
    """Seconds to the first bytes of a shard over the slow link, while the model is fetched."""
    cases = results.cases(group(SLOW), BESIDE)
    return ours(BESIDE, cases[-1], SLOW)(results) if cases else None


def beside_the_wire(results: Results) -> float | None:
    """From afar: time of the first load and inference, less that of an inference with everything in memory, / time of
    the bytes on the wire."""
    cold = ours(SUM, LLAMA, DISTANT)(results)
    inferring = results.median(group(HTTPS), INFER, LLAMA, NATIVE)
    wire = results.median(group(DISTANT), WIRE, LLAMA, GETS)
    return (cold - inferring) / wire if cold and inferring and wire else None


def _ratios(
    results: Results, name: str, cases: Sequence[str], others: Sequence[str], places: Sequence[str]
) -> Iterator[float]:
    for place in places:
        for case in cases:
            median = results.median(group(place), name, case, TRIMSFS)
            theirs = [found for other in others if (found := results.median(group(place), name, case, other))]
            if median and theirs:
                yield median / min(theirs)
