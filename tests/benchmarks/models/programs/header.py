"""Read the header of a safetensors file: its length, eight bytes, and so many more."""

import os
from collections.abc import Callable

from tests.benchmarks.models.programs.common import serve


def load(path: str) -> Callable[[], bytes]:
    """The first eight bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")

    def rest() -> bytes:
        header = os.pread(descriptor, length, 8)
        if len(header) != length:
            raise EOFError(f"{len(header)} of {length} bytes")
        return header

    return rest


if __name__ == "__main__":
    serve(load)
