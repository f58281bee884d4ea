"""Measure, and write the report: ``python -m tests.benchmarks [--quick] [--only GROUP,...] [--output DIR]``, as root.

Of the group ``models``, ``--programs``, ``--places`` and ``--contenders`` select what is measured, and ``--turns`` says
how often; of ``outages`` ``--programs`` selects. ``--memory`` says how memory is before each cold measurement.

Exits with 1 when a measurement failed; a budget that is missed is only reported. A run that is interrupted writes what
it has measured.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console

from tests.benchmarks import machine, plots, report
from tests.benchmarks.bench import FAILURES, PROFILE_LATENCY_MS, PROFILE_RATE, Bench
from tests.benchmarks.data import BUCKET, Data
from tests.benchmarks.measure import cold, growth, processes, service, stores, warm, ways
from tests.benchmarks.models.cases import SHORT
from tests.benchmarks.models.everything import models
from tests.benchmarks.models.loads import Selection
from tests.benchmarks.models.outages import outages
from tests.benchmarks.models.places import PLACES
from tests.benchmarks.models.ways import WAYS
from tests.benchmarks.options import parser_of, some_of
from tests.benchmarks.results import Results
from tests.benchmarks.scale import FULL, QUICK, Scale
from tests.benchmarks.scaling import growths
from tests.benchmarks.scaling import plots as growth_plots
from tests.services import SCRATCH
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
}
TOUCHED, FRESH = "touched", "fresh"
SELECTED = {"models": models, "outages": outages}
NAMES = [*GROUPS, *SELECTED]
LONG = ("stores", "scale", "outages")
"""Groups that are measured when they are asked for: the others take about an hour."""


def main() -> None:
    """Measure, print, write."""
    options = _options()
    console = Console(width=max(Console().width, 240))
    if os.geteuid() != 0:
        sys.exit("the benchmarks mount and drop caches: run them as root")
    if missing := machine.missing_programs():
        sys.exit(f"not installed: {', '.join(missing)}")
    options.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    scale = QUICK if options.quick else FULL
    if options.turns:
        scale = replace(scale, model_repetitions=options.turns)
    touched = scale.touched if options.memory == TOUCHED else 0
    facts = machine.facts() | machine.peers() | {"scale": "quick" if options.quick else "full", "touched": touched}
    selection = Selection(options.programs, options.places, options.contenders)
    results = _run(scale, options.only, selection, touched, console)
    report.show(results, console)
    drawn = plots.draw(results, options.output) + growth_plots.draw(results, options.output)
    (options.output / "results.json").write_text(report.as_json(results, facts))
    (options.output / "report.md").write_text(report.markdown(results, facts, drawn))
    console.print(f"written to {options.output}")
    sys.exit(1 if results.failures else 0)


def _run(scale: Scale, only: list[str], selection: Selection, touched: int, console: Console) -> Results:
    with ExitStack() as stack:
        scratch = tempfile.TemporaryDirectory(prefix="trimsfs-bench-", dir=SCRATCH, ignore_cleanup_errors=True)
        work = Path(stack.enter_context(scratch))
        data = Data(work)
        (data.store / BUCKET).mkdir(parents=True)
        plain = stack.enter_context(start_fast(data.store))
        profile = stack.enter_context(start_fast(data.store, latency_ms=PROFILE_LATENCY_MS, rate=PROFILE_RATE))
        bench = Bench(scale, work, data, plain, profile, console, touched)
        groups = GROUPS | {name: partial(part, selection=selection) for name, part in SELECTED.items()}
        for name in only:
            begun = time.monotonic()
            try:
                groups[name](bench)
            except FAILURES as error:
                # What goes wrong outside of one measurement, an unmount say.
                bench.results.failures.append(f"{name}: {type(error).__name__}: {error}")
            except KeyboardInterrupt:
                bench.results.failures.append(f"{name}: ended before it was done")
                break
            console.print(f"{name}: {time.monotonic() - begun:.0f} s", highlight=False)
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
