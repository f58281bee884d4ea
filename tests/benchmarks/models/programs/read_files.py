"""Read files from their first byte to their last, one after the other: a file, or a directory's by their names.

With ``--count`` the names are known, 000000 and so on, and the directory is not listed.
"""

import argparse
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.benchmarks.models.programs.common import serve

BLOCK = 1 << 20


def main() -> None:
    """Serve one request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=0)
    count = parser.parse_args().count

    def load(path: str) -> Callable[[], bytes]:
        return _read(f"{path}/{number:06}" for number in range(count)) if count else _read(_files(path))

    serve(load, infers=False)


def _files(path: str) -> list[str]:
    return sorted(str(file) for file in Path(path).glob("*.safetensors"))


def _read(paths: Iterable[str]) -> Callable[[], bytes]:
    buffer = bytearray(BLOCK)
    digest = 0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        while read := os.readv(descriptor, [buffer]):
            digest = zlib.crc32(buffer[: min(read, 64)], digest)  # of a few bytes each: reading is measured
        os.close(descriptor)
    return lambda: digest.to_bytes(4, "little")


if __name__ == "__main__":
    main()
