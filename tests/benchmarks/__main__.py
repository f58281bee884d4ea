"""Measure, and write the report: ``python -m tests.benchmarks [--quick] [--only GROUP,...] [--output DIR]``, as root.

Of the group ``models``, ``--programs``, ``--places`` and ``--contenders`` select what is measured, and ``--turns`` says
how often; of ``outages`` ``--programs`` selects. ``--memory`` says how memory is before each cold measurement.

Exits with 1 when a measurement failed; a budget that is missed is only reported. A run that is interrupted writes what
it has measured.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

from rich.console import Console

from tests.benchmarks import machine, plots, program, report, tables
from tests.benchmarks.bench import PROFILE_LATENCY_MS, PROFILE_RATE, Bench
from tests.benchmarks.data import BUCKET, Data
from tests.benchmarks.measure import cold, growth, processes, service, stores, warm, ways
from tests.benchmarks.models.cases import SHORT
from tests.benchmarks.models.loads import Loads, Selection
from tests.benchmarks.models.outages import outages
from tests.benchmarks.models.partial_reads import partial_reads
from tests.benchmarks.models.places import PLACES, places
from tests.benchmarks.models.starts import starts
from tests.benchmarks.models.ways import WAYS
from tests.benchmarks.program import parser_of, some_of
from tests.benchmarks.results import Results
from tests.benchmarks.scale import FULL, QUICK, Scale
from tests.benchmarks.scaling import growths
from tests.benchmarks.scaling import plots as growth_plots
from tests.services.fast import start_fast

GROUPS: dict[str, Callable[[Bench], None]] = {
    "cold": cold.cold,
    "warm": warm.warm,
    "processes": processes.processes,
    "remount": service.remount,
    "small": growth.small_files,
    "cost": service.cost,
    "distant": cold.distant,
    "stores": stores.stores,
    "directories": growth.directories,
    "sizes": growth.sizes,
    "busy": service.busy,
    "cold-open": cold.cold_open,
    "ways": ways.ways,
    "scale": growths.scale,
    "start": starts,
}
TOUCHED, FRESH = "touched", "fresh"


def models(bench: Bench, selection: Selection) -> None:
    """First loads of whole models, then of parts of files, from each endpoint."""
    with places(set(selection.places)) as there:
        Loads(bench, selection).measure(there)
        partial_reads(bench, selection, there)


SELECTED = {"models": models, "outages": outages}
NAMES = [*GROUPS, *SELECTED]
LONG = ("stores", "scale", "outages", "start")
"""Groups that are measured when they are asked for: the others take about an hour."""


def main() -> None:
    """Measure, print, write."""
    options = _options()
    console = program.begin(options.output, 240)
    if missing := machine.missing_programs():
        sys.exit(f"not installed: {', '.join(missing)}")
    scale = QUICK if options.quick else FULL
    if options.turns:
        scale = replace(scale, model_repetitions=options.turns)
    touched = scale.touched if options.memory == TOUCHED else 0
    facts = machine.facts() | machine.peers() | {"scale": "quick" if options.quick else "full", "touched": touched}
    selection = Selection(options.programs, options.places, options.contenders)
    results = _run(scale, options.only, selection, touched, console)
    tables.show(report.tables(results), console, results.failures, results.skipped)
    drawn = plots.draw(results, options.output) + growth_plots.draw(results, options.output)
    text = report.markdown(results, facts, drawn)
    program.finish(options.output, report.document(results, facts), text, results.failures, console)


def _run(scale: Scale, only: list[str], selection: Selection, touched: int, console: Console) -> Results:
    with ExitStack() as stack:
        work = stack.enter_context(program.scratch("bench"))
        data = Data(work)
        (data.store / BUCKET).mkdir(parents=True)
        plain = stack.enter_context(start_fast(data.store))
        profile = stack.enter_context(start_fast(data.store, latency_ms=PROFILE_LATENCY_MS, rate=PROFILE_RATE))
        bench = Bench(scale, work, data, plain, profile, console, touched)
        groups = GROUPS | {name: partial(part, selection=selection) for name, part in SELECTED.items()}
        program.run({name: partial(groups[name], bench) for name in only}, bench.results.failures, console)
        return bench.results


def _options() -> argparse.Namespace:
    parser = parser_of("tests.benchmarks", __doc__, NAMES, "build/benchmarks", asked_for=LONG)
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions")
    parser.add_argument("--turns", type=int, default=0, help="how often each contender loads a model")
    parser.add_argument(
        "--memory",
        choices=(TOUCHED, FRESH),
        default=TOUCHED,
        help="touched: a program writes gigabytes and ends before each cold measurement; fresh: nothing is prepared",
    )
    for name, known in (("programs", SHORT), ("places", PLACES), ("contenders", WAYS)):
        parser.add_argument(f"--{name}", type=some_of(known), default=frozenset(), help=f"some of {','.join(known)}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
