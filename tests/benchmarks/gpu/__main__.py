"""Measure a card, and write the report: ``python -m tests.benchmarks.gpu [--quick] [--only GROUP,...]``, as root.

``--check`` only sees whether there is a card. Exits with 2 when there is none, and with 1 when a measurement of trimsfs
failed. ``--emulated`` does all of it on an emulated device, to see that it works: it measures nothing.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console

from tests.benchmarks import machine, program, tables
from tests.benchmarks.data import BUCKET
from tests.benchmarks.gpu import card, report
from tests.benchmarks.gpu.bench import GpuBench
from tests.benchmarks.gpu.data import Models
from tests.benchmarks.gpu.fill import fetch, fill
from tests.benchmarks.gpu.load import load
from tests.benchmarks.gpu.memory import memory
from tests.benchmarks.gpu.scale import EMULATED_DEVICE, FULL, QUICK, TINY
from tests.benchmarks.program import parser_of
from tests.services.fast import start_fast
from tests.support.mounts import let_in
from trimsfs.extras.gpu.cuda import CudaError

NO_CARD = 2
GROUPS: dict[str, Callable[[GpuBench], None]] = {"fill": fill, "fetch": fetch, "load": load, "memory": memory}
LIBRARIES = ("torch", "safetensors", "fastsafetensors", "runai-model-streamer", "cuda-bindings")


def main() -> None:
    """See that there is a card; measure, print, write."""
    options = _options()
    if not options.emulated:
        try:
            card.check()
        except CudaError as error:
            print(f"no card to measure: {error}", file=sys.stderr)
            sys.exit(NO_CARD)
    if options.check:
        return
    console = program.begin(options.output, 160)
    bench = _run(options, console)
    results, facts = bench.results, bench.facts
    tables.show(report.tables(results, facts), console, results.failures, results.skipped)
    text = report.markdown(results, facts)
    program.finish(options.output, report.document(results, facts), text, results.failures, console)


def _run(options: argparse.Namespace, console: Console) -> GpuBench:
    with ExitStack() as stack:
        work = stack.enter_context(program.scratch("bench-gpu"))
        let_in(work)  # servers are not root
        models = Models(work)
        (models.store / BUCKET).mkdir(parents=True)
        server = stack.enter_context(start_fast(models.store))
        if options.emulated:
            scale, found = TINY, stack.enter_context(card.emulated(work, EMULATED_DEVICE))
        else:
            scale, found = QUICK if options.quick else FULL, card.card()
        bench = GpuBench(scale, work, found, models, server, console)
        bench.facts |= machine.facts() | found.facts() | _libraries()
        bench.facts["scale"] = "emulated" if options.emulated else "quick" if options.quick else "full"
        bench.note_link()
        program.run({name: partial(GROUPS[name], bench) for name in options.only}, bench.results.failures, console)
        return bench


def _libraries() -> dict[str, str]:
    return {"libraries": ", ".join(f"{name} {_version(name)}" for name in LIBRARIES)}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _options() -> argparse.Namespace:
    parser = parser_of("tests.benchmarks.gpu", __doc__, GROUPS, "build/benchmarks-gpu")
    parser.add_argument("--check", action="store_true", help="only see whether there is a card")
    parser.add_argument("--emulated", action="store_true", help="on no GPU, to see that it works")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
