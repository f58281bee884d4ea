"""The results of a fleet as a table in the terminal, as markdown and as JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table as RichTable

from tests.benchmarks.fleet.cases import Result
from tests.benchmarks.report import Table, table_markdown

_HEADINGS = ("case", "measured", "value", "bound", "")


def show(results: Sequence[Result], console: Console) -> None:
    """Print them."""
    table = RichTable(*_HEADINGS)
    for row in _rows(results):
        table.add_row(*row)
    console.print(table)


def markdown(results: Sequence[Result], facts: Mapping[str, str | int]) -> str:
    """The whole report."""
    about = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    return f"# A fleet\n\n{about}\n\n{table_markdown(Table('Results', _HEADINGS, _rows(results)), '##')}\n"


def as_json(results: Sequence[Result], facts: Mapping[str, str | int]) -> str:
    """All results and the machine."""
    return json.dumps({"machine": dict(facts), "results": [asdict(result) for result in results]}, indent=2) + "\n"


def _rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    return [
        (
            result.case,
            result.name,
            f"{result.value:.3g}",
            "" if result.bound is None else f"{result.bound:g}",
            "" if result.bound is None else "met" if result.met else "missed",
        )
        for result in results
    ]
