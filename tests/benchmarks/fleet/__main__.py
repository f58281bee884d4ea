"""Measure a fleet and write the report: ``python -m tests.benchmarks.fleet [--quick] [--only CASE,...]``, as root.

Exits with 1 when a case failed or a reader got a wrong byte; a bound that is missed is only reported.
"""

import argparse
from dataclasses import asdict
from functools import partial

from pydantic import ByteSize, TypeAdapter
from rich.console import Console

from tests.benchmarks import machine, program, tables
from tests.benchmarks.fleet import caches, cases
from tests.benchmarks.fleet.cases import Case, References, Result
from tests.benchmarks.fleet.setting import a_setting
from tests.benchmarks.program import parser_of
from tests.support.mounts import let_in
from tests.support.network import MEGABIT

SIZE, HOSTS = ByteSize(1 << 30), 8
QUICK_SIZE, QUICK_HOSTS = ByteSize(128 << 20), 4
CASES = cases.CASES | caches.CASES
LEAST_TIMEOUT_S = 60
PATIENCE = 3
"""A case may take so many times as long as the store would take to send the object to each host."""


def main() -> None:
    """Measure, print, write."""
    options = _options()
    console = program.begin(options.output, 120)
    results, failures = _run(options, console)
    facts = machine.facts() | {
        "hosts": options.hosts,
        "object": f"{options.size / 2**20:g} MiB",
        "links": f"{options.megabits} Mbit/s each way, the store's too",
    }
    rows = [[result.case, result.name, f"{result.value:.3g}", *result.verdict] for result in results]
    table = tables.Table("Results", ["case", "measured", "value", "bound", ""], rows)
    tables.show([table], console, failures)
    document = {"machine": facts, "results": [asdict(result) for result in results]}
    about = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    program.finish(options.output, document, f"# A fleet\n\n{about}\n\n{table.markdown()}\n", failures, console)


def _run(options: argparse.Namespace, console: Console) -> tuple[list[Result], list[str]]:
    results: list[Result] = []
    failures: list[str] = []
    rate = options.megabits * MEGABIT
    patience_s = max(LEAST_TIMEOUT_S, options.size / rate * options.hosts * PATIENCE)

    def measure(case: Case, references: References) -> None:
        for result in case(references):
            results.append(result)
            console.print(f"[dim]{result.case}: {result.name}: {result.value:.3g}[/dim]", highlight=False)

    with program.scratch("fleet") as scratch:
        let_in(scratch)
        limits = {"size": options.size, "rate": rate, "count": options.hosts, "timeout_s": patience_s}
        with a_setting(scratch, options.output / "logs", **limits) as setting:
            references = References(setting)
            program.run({name: partial(measure, CASES[name], references) for name in options.only}, failures, console)
            failures += [f"a wrong byte on {reader}" for reader in setting.wrong]
    return results, failures


def _options() -> argparse.Namespace:
    output = "build/benchmarks-fleet"
    parser = parser_of("tests.benchmarks.fleet", __doc__, CASES, output, asked_for=caches.CASES)
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
