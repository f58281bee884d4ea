"""What a measured program on a member does: read files and compare every byte with what they must hold.

It says ``ready``, waits for a line, acts, and prints one line of JSON. Times are of CLOCK_MONOTONIC.
"""

import argparse
import json
import os
import random
import select
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BLOCK = 1 << 20
FIRST = 1 << 12
SAID = 20
"""How many of its errors it tells."""


def once(options: argparse.Namespace) -> Mapping[str, Any]:
    """Read a file from its begin to its end."""
    begun = time.monotonic()
    with options.path.open("rb", buffering=0) as file, options.expected.open("rb", buffering=0) as expected:
        first = file.read(FIRST)
        first_at = time.monotonic()
        wrong, done = first != expected.read(FIRST), len(first)
        while piece := file.read(BLOCK):
            wrong |= piece != expected.read(len(piece))
            done += len(piece)
    ended = time.monotonic()
    wrong |= done != options.expected.stat().st_size
    return {"first_s": first_at - begun, "seconds": ended - begun, "ended": ended, "bytes": done, "wrong": int(wrong)}


def forever(options: argparse.Namespace) -> Mapping[str, Any]:
    """Read the files of a directory in random order, new ones first, again and again, until another line comes.

    Then all have been read.
    """
    seen, order = set[str](), random.Random(options.seed)
    reads, done, longest_s, errors, wrong = 0, 0, 0.0, [], []
    while True:
        names = sorted(os.listdir(options.expected))
        new = [name for name in names if name not in seen]
        if not new and _told():
            break
        name = order.choice(new or names)
        seen.add(name)
        begun = time.monotonic()
        try:
            for at, size, right in _compared(options.path / name, options.expected / name):
                done += size
                if not right:
                    wrong.append(f"{name} at {at}")
        except OSError as error:
            errors.append(f"{name}: {error}")
            time.sleep(0.1)
        reads += 1
        longest_s = max(longest_s, time.monotonic() - begun)
    return {"reads": reads, "bytes": done, "longest_s": longest_s, "errors": errors[:SAID], "wrong": wrong[:SAID]}


def _compared(path: Path, expected: Path) -> Iterator[tuple[int, int, bool]]:
    """Position and size of each block, and whether it is right; a file that ends early has a wrong one."""
    with path.open("rb", buffering=0) as file, expected.open("rb", buffering=0) as right:
        at = 0
        while wanted := right.read(BLOCK):
            piece = b""
            while len(piece) < len(wanted) and (more := file.read(len(wanted) - len(piece))):
                piece += more
            yield at, len(piece), piece == wanted
            at += len(wanted)


def _told() -> bool:
    return bool(select.select([sys.stdin], [], [], 0)[0])


ACTIONS = {function.__name__: function for function in (once, forever)}


def main() -> None:
    """Wait for the word, act, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("path", type=Path)
    parser.add_argument("--expected", type=Path, default=Path("/dev/null"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("ready", flush=True)
    while os.read(sys.stdin.fileno(), 1) != b"\n":  # not the line after, which may be here already
        pass
    print(json.dumps(ACTIONS[options.action](options)), flush=True)


if __name__ == "__main__":
    main()
