"""How the programs are told what to do, and answer."""

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTH, LAYERS = 2048, 6

Load = Callable[[Path], "tuple[object, bytes]"]
"""Loads what lies in a directory and uses it; what must stay alive meanwhile, and the bytes of the output."""
Way = tuple[str, Load]
"""Which files it loads, as a pattern."""


def main(build: Callable[[Path, int], None], ways: Mapping[str, Way]) -> None:
    """``build DIRECTORY`` writes the models, with ``--divide N`` about so many times smaller ones.

    ``load WAY`` waits for a path, loads it, and tells the time and the output. It then holds the model, tells its
    memory after a line of input, and ends with the input.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["build", "load"])
    parser.add_argument("argument")
    parser.add_argument("--divide", type=int, default=1)
    options = parser.parse_args()
    if options.action == "build":
        directory = Path(options.argument)
        directory.mkdir(parents=True)
        build(directory, options.divide)
        for path in directory.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # some libraries make files that only their owner may read
        return
    pattern, load = ways[options.argument]
    print("ready", flush=True)
    directory = Path(sys.stdin.readline().rstrip("\n"))
    before = kib("Anonymous")
    begun = time.perf_counter()
    held, output = load(directory)
    taken = time.perf_counter() - begun
    size = sum(path.stat().st_size for path in directory.glob(pattern))
    tell({"load_s": taken, "digest": f"{zlib.crc32(output):08x}", "size": size})
    sys.stdin.readline()
    tell({"mapped": mapped_kib(directory) << 10, "copied": (kib("Anonymous") - before) << 10})
    sys.stdin.read()
    del held


def tell(answer: Mapping[str, float | str]) -> None:
    """Print one line of JSON."""
    print(json.dumps(answer), flush=True)


def kib(field: str) -> int:
    """A field of this process's memory, in KiB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def mapped_kib(directory: Path) -> int:
    """How much of the files below a directory this process maps and has in memory, its own pages left out, in KiB."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            inside = len(words) > 5 and words[5].startswith(f"{directory}/")
        elif inside and words[0] == "Rss:":
            total += int(words[1])
        elif inside and words[0] == "Anonymous:":
            total -= int(words[1])
    return total


def matrices(divide: int) -> Iterator[Any]:
    """Random square matrices of float32, LAYERS of WIDTH, that keep the size of what they are multiplied with."""
    import numpy as np

    random = np.random.default_rng(0)
    for _ in range(max(1, LAYERS // divide)):
        yield random.standard_normal((WIDTH, WIDTH), dtype=np.float32) / 45


def floats(values: Sequence[float]) -> bytes:
    """Numbers as bytes, rounded: libraries may add in another order."""
    return json.dumps([f"{value:.4g}" for value in values]).encode()
