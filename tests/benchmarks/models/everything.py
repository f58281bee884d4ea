"""The part of the benchmarks that is about models: `models` measures all of it, or what is selected."""

from tests.benchmarks.bench import Bench
from tests.benchmarks.models.loads import Loads, Selection
from tests.benchmarks.models.partial_reads import partial_reads
from tests.benchmarks.models.places import places


def models(bench: Bench, selection: Selection) -> None:
    """First loads of whole models, then of parts of files, from each endpoint."""
    with places(set(selection.places)) as found:
        Loads(bench, selection).measure(found)
        partial_reads(bench, selection, found)
