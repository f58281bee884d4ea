"""Compute until killed, and count: ``compute FILE PLACE``. The count is the number at that place of the file.

A neighbour of the load that is measured: it takes a core if it can have one, and needs no memory to speak of.
"""

import argparse
import hashlib
import mmap
import struct
import sys

COUNT = "<Q"
UNIT = bytes(1 << 16)
"""About 50 µs of work."""


def main() -> None:
    """Wait for the word, compute."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("place", type=int)
    options = parser.parse_args()
    offset = options.place * struct.calcsize(COUNT)
    with open(options.file, "r+b") as file:
        counts = mmap.mmap(file.fileno(), 0)
    print("ready", flush=True)
    sys.stdin.readline()
    done = 0
    while True:
        hashlib.sha256(UNIT)
        done += 1
        struct.pack_into(COUNT, counts, offset, done)


if __name__ == "__main__":
    main()
