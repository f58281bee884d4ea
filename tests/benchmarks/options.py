"""The options that all programs which measure have."""

import argparse
from collections.abc import Callable, Collection, Iterable
from pathlib import Path


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
