"""Measure a card, and write the report: ``python -m tests.benchmarks.gpu [--quick] [--only GROUP,...]``, as root.

``--check`` only sees whether there is a card. Exits with 2 when there is none, and with 1 when a measurement of trimsfs
failed. ``--emulated`` does all of it on an emulated device, to see that it works: it measures nothing.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console

from tests.benchmarks import machine
from tests.benchmarks.bench import FAILURES
from tests.benchmarks.children import TooSlowError
from tests.benchmarks.data import BUCKET
from tests.benchmarks.gpu import card, report
from tests.benchmarks.gpu.bench import GpuBench
from tests.benchmarks.gpu.data import Models
from tests.benchmarks.gpu.fill import fetch, fill
from tests.benchmarks.gpu.load import load
from tests.benchmarks.gpu.memory import memory
from tests.benchmarks.gpu.scale import EMULATED_DEVICE, FULL, QUICK, TINY
from tests.benchmarks.options import parser_of
from tests.benchmarks.report import show_tables
from tests.services import SCRATCH
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
    if os.geteuid() != 0:
        sys.exit("the benchmarks mount: run them as root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that everything is unmounted then too
    options.output.mkdir(parents=True, exist_ok=True)
    console = Console(width=max(Console().width, 160))
    bench = _run(options, console)
    show_tables(report.tables(bench.results, bench.facts), bench.results, console)
    (options.output / "results.json").write_text(report.as_json(bench.results, bench.facts))
    (options.output / "report.md").write_text(report.markdown(bench.results, bench.facts))
    console.print(f"written to {options.output}")
    sys.exit(1 if bench.results.failures else 0)


def _run(options: argparse.Namespace, console: Console) -> GpuBench:
    with ExitStack() as stack:
        scratch = tempfile.TemporaryDirectory(prefix="trimsfs-bench-gpu-", dir=SCRATCH, ignore_cleanup_errors=True)
        work = Path(stack.enter_context(scratch))
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
        for name in options.only:
            begun = time.monotonic()
            try:
                GROUPS[name](bench)
            except (TooSlowError, *FAILURES) as error:
                # What goes wrong outside of one measurement, a mount say.
                bench.results.failures.append(f"{name}: {type(error).__name__}: {error}")
            console.print(f"{name}: {time.monotonic() - begun:.0f} s", highlight=False)
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
