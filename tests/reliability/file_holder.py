"""Holds many files open: ``python -m tests.reliability.file_holder DIRECTORY SKIP COUNT SIZE``.

They are those below the directory, in order of name, after the first SKIP. Prints ``ready`` once they are open, and at
each line on standard input reads them all and prints JSON: how many reads there were, how many gave wrong bytes (all
files are copies of one), and errors by the name of their errno.
"""

import errno
import json
import os
import resource
import sys
from collections import Counter
from itertools import islice

from tests.benchmarks.reader import below


def main() -> None:
    directory, skip, count, size = sys.argv[1], *map(int, sys.argv[2:])
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    files = [os.open(entry.path, os.O_RDONLY) for entry in islice(below(directory), skip, skip + count)]
    content = os.pread(files[0], size + 1, 0)
    print("ready", flush=True)
    for _ in sys.stdin:
        errors: Counter[str] = Counter()
        wrong = 0
        for file in files:
            try:
                wrong += os.pread(file, size + 1, 0) != content
            except OSError as error:
                errors[errno.errorcode[error.errno or 0]] += 1
        print(json.dumps({"operations": len(files), "wrong": wrong, "errors": errors}), flush=True)


if __name__ == "__main__":
    main()
