"""Measure a fleet and write the report: ``python -m tests.benchmarks.fleet [--quick] [--only CASE,...]``, as root.

Exits with 1 when a case failed or a reader got a wrong byte; a bound that is missed is only reported.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from pydantic import ByteSize, TypeAdapter
from rich.console import Console

from tests.benchmarks import machine
from tests.benchmarks.bench import FAILURES
from tests.benchmarks.children import TooSlowError
from tests.benchmarks.fleet import report
from tests.benchmarks.fleet.cases import CASES, References, Result
from tests.benchmarks.fleet.setting import a_setting
from tests.benchmarks.options import parser_of
from tests.services import SCRATCH
from tests.support.mounts import let_in
from tests.support.network import MEGABIT

SIZE, HOSTS = ByteSize(1 << 30), 8
QUICK_SIZE, QUICK_HOSTS = ByteSize(128 << 20), 4
LEAST_TIMEOUT_S = 60
PATIENCE = 3
"""A case may take so many times as long as the store would take to send the object to each host."""


def main() -> None:
    """Measure, print, write."""
    options = _options()
    console = Console(width=max(Console().width, 120))
    if os.geteuid() != 0:
        sys.exit("the benchmarks mount: run them as root")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that everything is unmounted then too
    options.output.mkdir(parents=True, exist_ok=True)
    results, failures = _run(options, console)
    facts = machine.facts() | {
        "hosts": options.hosts,
        "object": f"{options.size / 2**20:g} MiB",
        "links": f"{options.megabits} Mbit/s each way, the store's too",
    }
    report.show(results, console)
    (options.output / "results.json").write_text(report.as_json(results, facts))
    (options.output / "report.md").write_text(report.markdown(results, facts))
    for failure in failures:
        console.print(f"[red]failed:[/red] {failure}", highlight=False)
    console.print(f"written to {options.output}")
    sys.exit(1 if failures else 0)


def _run(options: argparse.Namespace, console: Console) -> tuple[list[Result], list[str]]:
    results: list[Result] = []
    failures: list[str] = []
    rate = options.megabits * MEGABIT
    patience_s = max(LEAST_TIMEOUT_S, options.size / rate * options.hosts * PATIENCE)
    with tempfile.TemporaryDirectory(prefix="trimsfs-fleet-", dir=SCRATCH, ignore_cleanup_errors=True) as scratch:
        let_in(Path(scratch))
        with a_setting(
            Path(scratch),
            options.output / "logs",
            size=options.size,
            rate=rate,
            count=options.hosts,
            timeout_s=patience_s,
        ) as setting:
            references = References(setting)
            for name in options.only:
                begun = time.monotonic()
                try:
                    for result in CASES[name](references):
                        results.append(result)
                        console.print(f"[dim]{result.case}: {result.name}: {result.value:.3g}[/dim]", highlight=False)
                except (*FAILURES, TooSlowError) as error:
                    failures.append(f"{name}: {type(error).__name__}: {error}")
                except KeyboardInterrupt:
                    failures.append(f"{name}: ended before it was done")
                    break
                console.print(f"{name}: {time.monotonic() - begun:.0f} s", highlight=False)
            failures += [f"a wrong byte on {reader}" for reader in setting.wrong]
    return results, failures


def _options() -> argparse.Namespace:
    parser = parser_of("tests.benchmarks.fleet", __doc__, CASES, "build/benchmarks-fleet")
    parser.add_argument("--quick", action="store_true", help="a small object, few hosts")
    parser.add_argument("--size", type=TypeAdapter(ByteSize).validate_python)
    parser.add_argument("--hosts", type=int)
    parser.add_argument("--megabits", type=int, default=200, help="of each link, a second")
    options = parser.parse_args()
    options.size = options.size or (QUICK_SIZE if options.quick else SIZE)
    options.hosts = options.hosts or (QUICK_HOSTS if options.quick else HOSTS)
    return options


if __name__ == "__main__":
    main()
