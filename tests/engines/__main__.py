"""``make engines``: the table of engines, as docs/frameworks.md has it; writes it below build/engines."""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from tests.benchmarks.children import ChildError, TooSlowError
from tests.engines.engines import ENGINE_ROWS
from tests.engines.matrix import REPEATED, Row, matrix
from tests.services.seaweed import start_seaweed

HEAD = """\
| engine | model, MB | mapped | copied | cold / local | warm / local | why copied | forked |
| --- | ---: | ---: | ---: | ---: | ---: | --- | --- |
"""


def markdown(rows: Sequence[Row]) -> str:
    """Sizes in MB; times as ratios to a local file that is in memory."""
    known = {engine.name: engine for engine in ENGINE_ROWS}
    lines = []
    for row in rows:
        engine = known[row.engine]
        lines.append(
            f"| {engine.title} | {row.size / 1e6:.0f} | {row.mapped / 1e6:.0f} | {row.copied / 1e6:.0f} | "
            f"{row.cold_s / row.local_s:.1f} | {row.warm_s / row.local_s:.2f} | {engine.copies} | {row.forked.how} |"
        )
    return HEAD + "\n".join(lines) + "\n"


def main() -> None:
    """Try all that are selected, and print the table. Exits with 1 if one failed or gave another output."""
    parser = argparse.ArgumentParser(prog="make engines", description=__doc__)
    parser.add_argument("--only", default="", help="names, or parts of names, separated by commas")
    parser.add_argument(
        "--repeated", type=int, default=REPEATED, help="how often each load but the cold one is measured"
    )
    parser.add_argument("--output", type=Path, default=Path("build/engines"))
    options = parser.parse_args()
    console, rows, failures = Console(), list[Row](), list[str]()
    chosen = [
        engine
        for engine in ENGINE_ROWS
        if not options.only or any(part in engine.name for part in options.only.split(","))
    ]
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="trimsfs-engines-", dir="/var/tmp")))
        here = stack.enter_context(matrix(stack.enter_context(start_seaweed()), directory, repeated=options.repeated))
        for engine in chosen:
            if not engine.python.exists():
                failures.append(f"{engine.name}: no {engine.environment}")
                continue
            try:
                rows.append(here.row(engine))
            except (ChildError, TooSlowError, OSError, AssertionError, subprocess.TimeoutExpired) as error:
                failures.append(f"{engine.name}: {error}")
                console.print(f"[red]{failures[-1]}[/red]", highlight=False)
                continue
            console.print(markdown(rows[-1:]).splitlines()[-1], highlight=False, soft_wrap=True)
            sys.stdout.flush()
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    (options.output / "table.md").write_text(markdown(rows))
    console.print(markdown(rows), highlight=False, soft_wrap=True)
    failures += [f"{row.engine}: another output from the mount" for row in rows if not row.equal]
    failures += [f"{row.engine}: another output in a fork" for row in rows if not row.forked.equal]
    for failure in failures:
        console.print(f"failed: {failure}", style="red", highlight=False)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
