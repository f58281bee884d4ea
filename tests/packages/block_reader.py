"""Opens a file, reads a block at random and compares it with a copy, over and over: for the Python of a clean root.

``block_reader.py FILE COPY STOP REPORT`` runs until STOP exists. REPORT then tells of its reads, in JSON.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

BLOCK = 1 << 20
PAUSE_S = 0.01
"""Between two reads: readers that took the cores from each other would measure that."""
ERRORS = 20
"""After how many errors it ends: all that follow would say the same."""


def main(file: Path, copy: Path, stop: Path, report: Path) -> None:
    """Read until there is *stop*; *report* tells how often, the longest time that it took, and what went wrong."""
    content, draw = copy.read_bytes(), random.Random(report.name)
    reads, longest_s, errors = 0, 0.0, list[str]()
    while not stop.exists() and len(errors) < ERRORS:
        offset = draw.randrange(len(content))
        began = time.monotonic()
        try:
            with file.open("rb", buffering=0) as opened:
                block = os.pread(opened.fileno(), BLOCK, offset)
            if block != content[offset : offset + BLOCK]:
                errors.append(f"{time.ctime()}: wrong bytes at {offset}")
        except OSError as error:
            errors.append(f"{time.ctime()}: {error}")
        longest_s = max(longest_s, time.monotonic() - began)
        reads += 1
        time.sleep(PAUSE_S)
    seen = {"reads": reads, "longest_s": longest_s, "errors": errors}
    report.with_suffix(".part").write_text(json.dumps(seen) + "\n")
    report.with_suffix(".part").rename(report)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
