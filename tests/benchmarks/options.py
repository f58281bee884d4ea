"""The options that all programs which measure have."""

import argparse
from collections.abc import Iterable
from pathlib import Path


def parser_of(package: str, about: str | None, parts: Iterable[str], output: str) -> argparse.ArgumentParser:
    """A parser of ``--only``, some of these parts and else all, and ``--output``, a directory with this default."""
    every = list(parts)

    def some(text: str) -> list[str]:
        names = text.split(",")
        if unknown := set(names) - set(every):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: none of {', '.join(every)}")
        return names

    parser = argparse.ArgumentParser(prog=f"python -m {package}", description=about)
    parser.add_argument("--only", type=some, default=every, help=f"some of {','.join(every)}")
    parser.add_argument("--output", type=Path, default=Path(output))
    return parser
