"""The TrIMS paper's evaluation: ``python -m tests.evaluation PYTHON [--quick] [--only PART,...]``, as root.

PYTHON is an interpreter that has MXNet. Exits with 1 when a request failed or gave another output.
"""

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

from rich.console import Console

from tests.benchmarks import machine, program, tables
from tests.benchmarks.program import parser_of
from tests.evaluation import plots, report
from tests.evaluation.clients import clients
from tests.evaluation.folding import folding
from tests.evaluation.policies import policies
from tests.evaluation.results import Results
from tests.evaluation.setting import BUCKET, Model, Setting
from tests.evaluation.single import single
from tests.services.fast import start_fast

QUICK = ("squeezenet-1.1", "resnet18-v2", "googlenet", "alexnet")
PARTS = ("single", "clients", "policies", "folding")


def main() -> None:
    """Measure, print, write."""
    options = _options()
    console = program.begin(options.output, 200)
    facts = machine.facts() | {"scale": "quick" if options.quick else "full"}
    results, models = _run(options, console)
    made = report.tables(results, models)
    tables.show(made, console, results.failures)
    for remark in report.remarks(results, facts):
        console.print(remark, highlight=False)
    for old in options.output.glob("*.svg"):
        old.unlink()
    drawn = plots.draw(results, models, options.output)
    text = report.markdown(made, results, facts, drawn)
    program.finish(options.output, {"facts": facts, **asdict(results)}, text, results.failures, console)


def _run(options: argparse.Namespace, console: Console) -> tuple[Results, list[Model]]:
    results = Results()
    with ExitStack() as stack:
        work = stack.enter_context(program.scratch("evaluation"))
        (work / "store" / BUCKET).mkdir(parents=True)
        setting = Setting(options.python, work, stack.enter_context(start_fast(work / "store")), console)
        models = setting.models()
        if options.quick:
            models = [model for model in models if model.name in QUICK]
        if options.models:
            if unknown := set(options.models) - {model.name for model in models}:
                sys.exit(f"{', '.join(sorted(unknown))}: none of {', '.join(model.name for model in models)}")
            models = [model for model in models if model.name in options.models]
        parts = _parts(setting, models, results, quick=options.quick)
        program.run({name: parts[name] for name in options.only}, results.failures, console)
    results.failures += [f"{name}: outputs differ" for name in results.differing()]
    return results, models


def _parts(setting: Setting, models: list[Model], results: Results, *, quick: bool) -> dict[str, Callable[[], None]]:
    small = [model for model in models if not model.large]
    return {
        "single": lambda: single(setting, models, results, repeat=1 if quick else 2),
        "clients": lambda: clients(
            setting,
            small,
            results,
            shares=(1.0,) if quick else (0.1, 0.5, 1.0),
            counts=(1, 4) if quick else (1, 2, 5, 10),
            requests=20 if quick else 100,
        ),
        "policies": lambda: policies(setting, small, results, requests=20 if quick else 300),
        "folding": lambda: folding(setting, small, results, processes=2 if quick else 8),
    }


def _options() -> argparse.Namespace:
    parser = parser_of("tests.evaluation", __doc__, PARTS, "build/evaluation")
    parser.add_argument("python", type=os.path.abspath, help="an interpreter that has MXNet")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, few repetitions")
    parser.add_argument("--models", type=lambda text: text.split(","), help="only these")
    return parser.parse_args()


if __name__ == "__main__":
    main()
