"""What a program does that uses many names, many files or a huge one: ``python -m tests.benchmarks.scaling.reader``.

Prints ``ready``, acts when it is sent a line, and prints JSON with times in seconds. `hold` then keeps its files open
until it is sent another line.
"""

import argparse
import json
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from itertools import islice

from tests.benchmarks.reader import FIRST, percentile


def walk(path: str, options: argparse.Namespace) -> dict[str, float]:
    """List all below a directory and stat every file, as ``ls -lR`` does; then stat some of them again, at random."""
    begun = time.perf_counter()
    found = []
    for entry in below(path):
        entry.stat(follow_symlinks=False)
        found.append(entry.path)
    seconds = time.perf_counter() - begun
    times = []
    for name in random.Random(5).choices(found, k=options.count):
        stat_begun = time.perf_counter_ns()
        os.stat(name)
        times.append((time.perf_counter_ns() - stat_begun) / 1e9)
    return {"seconds": seconds, "files": len(found), "stat": percentile(sorted(times), 0.5)}


def hold(path: str, options: argparse.Namespace) -> dict[str, float]:
    """Open files below a directory, those after the first that are to be skipped, and keep them open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    paths = [entry.path for entry in islice(below(path), options.skip, options.skip + options.count)]
    times = []
    for name in paths:
        begun = time.perf_counter()
        os.open(name, os.O_RDONLY)
        times.append(time.perf_counter() - begun)
    return {"seconds": sum(times), "each": percentile(sorted(times), 0.5), "files": len(times)}


def peek(path: str, _: argparse.Namespace) -> dict[str, float]:
    """Open a file and read a bit of its begin, its middle and its end."""
    begun = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    opened = time.perf_counter()
    size = os.fstat(descriptor).st_size
    for offset in (0, size // 2 // FIRST * FIRST, size - FIRST):
        if len(os.pread(descriptor, FIRST, offset)) != FIRST:
            raise ValueError(f"{path} ends before {offset + FIRST}")
    return {"open": opened - begun, "reads": time.perf_counter() - opened}


def below(path: str) -> Iterator["os.DirEntry[str]"]:
    """The files below a directory, in order of name."""
    with os.scandir(path) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.is_dir(follow_symlinks=False):
            yield from below(entry.path)
        else:
            yield entry


ACTIONS = {function.__name__: function for function in (walk, hold, peek)}


def main() -> None:
    """Wait for the word, act, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("path")
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--skip", type=int, default=0)
    options = parser.parse_args()
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(ACTIONS[options.action](options.path, options)), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
