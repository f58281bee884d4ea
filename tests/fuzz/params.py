"""Feed damaged files of MXNet's arrays to the scanner in C: ``python -m tests.fuzz.params LIBRARY --count 1000000``.

What it takes has to be what the parser in Python makes of the file. A library built for the address sanitizer tells of
bytes read behind the end of one.
"""

import argparse
import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.fuzz.formats import damaged
from tests.support.model_files import Array, mxnet
from trimsfs.formats import BufferSource, FormatError, Tensor, parse

ORIGINAL = mxnet(
    {
        "arg:weight": Array("float32", (2, 3), bytes(range(24))),
        "arg:bias": Array("uint8", (4,), b"bias"),
        "aux:mean": Array("float16", (1, 2, 1), b"mean"),
    }
)
LEFT_TO_PYTHON = ("is not UTF-8", "two tensors have the same name")
"""What the scanner has no opinion on."""
MOST = 64
DTYPES = {
    **{(0, bits): f"int{bits}" for bits in (8, 32, 64)},
    **{(2, bits): f"float{bits}" for bits in (16, 32, 64)},
    (1, 8): "uint8",
    (1, 1): "bool",
}
"""By DLPack's kind and bits."""


class Record(ctypes.Structure):
    """As in ``_params.c``."""

    _fields_ = (
        *((name, ctypes.c_uint64) for name in ("data", "nbytes", "shape", "name", "name_length")),
        ("dimensions", ctypes.c_int32),
        *((name, ctypes.c_uint8) for name in ("code", "bits")),
        ("unused", ctypes.c_uint16),
    )


@dataclass(frozen=True, slots=True)
class Scanner:
    """The function of a library, and memory of just the size that a file has."""

    library: ctypes.CDLL

    def scan(self, data: bytes) -> list[Tensor] | None:
        """The arrays of a file; None of one that is refused."""
        count = int.from_bytes(data[16:24], "little")
        if count > MOST:
            return None
        records = (Record * count)()
        with _memory(data) as address:
            named = self.library.trimsfs_scan(ctypes.c_void_p(address), ctypes.c_size_t(len(data)), records, count)
        if named < 0:
            return None
        found = []
        for number, record in enumerate(records):
            shape = struct.unpack_from(f"<{record.dimensions}q", data, record.shape - address)
            name = data[record.name : record.name + record.name_length].decode(errors="replace")
            dtype = DTYPES[record.code, record.bits]
            found.append(Tensor(name if named else str(number), dtype, shape, record.data - address, record.nbytes))
        return found


@contextmanager
def _memory(data: bytes) -> Iterator[int]:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    address = libc.malloc(ctypes.c_size_t(len(data)))
    ctypes.memmove(address, data, len(data))
    try:
        yield address
    finally:
        libc.free(ctypes.c_void_p(address))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.params", description=__doc__)
    parser.add_argument("library")
    parser.add_argument("--count", type=int, default=1_000_000)
    options = parser.parse_args()
    library = ctypes.CDLL(options.library)
    library.trimsfs_scan.restype = ctypes.c_long
    scanner = Scanner(library)
    taken = 0
    for number in range(-1, options.count):
        data = ORIGINAL if number < 0 else damaged(f"params/{number}", ORIGINAL)
        found = scanner.scan(data)
        if found is None:
            continue
        try:
            expected = list(parse(BufferSource(data), "model.params").tensors)
        except FormatError as error:
            if not str(error).endswith(LEFT_TO_PYTHON):
                raise
            continue
        if found != expected:
            raise SystemExit(f"file {number}: {found} is not {expected}")
        taken += 1
    print(f"{taken} of {options.count + 1} taken")


if __name__ == "__main__":
    main()
