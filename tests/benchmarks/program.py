"""What all programs that measure do: take options, run their parts in turn, write what came of it."""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from tests.benchmarks.bench import FAILURES
from tests.benchmarks.children import TooSlowError
from tests.services import SCRATCH


def parser_of(
    package: str, about: str | None, parts: Iterable[str], output: str, *, asked_for: Collection[str] = ()
) -> argparse.ArgumentParser:
    """A parser of ``--only``, some of these parts and else all that need not be *asked_for*, and ``--output``, a
    directory with this default."""
    every = list(parts)
    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=about)
    parser.add_argument(
        "--only",
        type=some_of(every),
        default=[part for part in every if part not in asked_for],
        help=f"some of {','.join(every)}",
    )
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser


def some_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """A type of arguments: some of these names, separated by commas."""

    def some(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: none of {', '.join(known)}")
        return names

    return some


def begin(output: Path, width: int) -> Console:
    """What is printed to, so many columns wide at least. Ends the program if it is not root's.

    SIGTERM then interrupts it, so that everything is unmounted.
    """
    if os.geteuid() != 0:
        sys.exit("this mounts and drops caches: run it as root")
    output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return Console(width=max(Console().width, width))


@contextmanager
def scratch(kind: str) -> Iterator[Path]:
    """A directory for the length of the block."""
    with tempfile.TemporaryDirectory(prefix=f"trimsfs-{kind}-", dir=SCRATCH, ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def run(parts: Mapping[str, Callable[[], object]], failures: list[str], console: Console) -> None:
    """Run parts, one after the other. What goes wrong outside of one measurement, an unmount say, is a failure."""
    for name, part in parts.items():
        begun = time.monotonic()
        try:
            part()
        except (TooSlowError, *FAILURES) as error:
            failures.append(f"{name}: {type(error).__name__}: {error}")
        except KeyboardInterrupt:
            failures.append(f"{name}: ended before it was done")
            break
        console.print(f"{name}: {time.monotonic() - begun:.0f} s", highlight=False)


def finish(
    output: Path, document: Mapping[str, object], report: str, failures: Sequence[str], console: Console
) -> NoReturn:
    """Write all samples and the report, and end the program: with 1 if something failed."""
    (output / "results.json").write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    (output / "report.md").write_text(report)
    console.print(f"written to {output}")
    sys.exit(1 if failures else 0)
