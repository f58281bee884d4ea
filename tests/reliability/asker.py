"""One operation that waits for a mount: ``python asker.py KIND PATH`` says when it begins, and when it is done.

KIND is one of the operations below. What was read is told by its SHA-256.
"""

import hashlib
import mmap
import os
import sys
from collections.abc import Callable


def main() -> None:
    kind, path = sys.argv[1:]
    descriptor = os.open(path, os.O_RDONLY) if kind in {"read", "touch"} else -1  # which must not wait
    operations: dict[str, Callable[[], object]] = {
        "list": lambda: os.listdir(path),
        "stat": lambda: os.stat(path),
        "attribute": lambda: os.getxattr(path, "user.trims.tensors"),
        "open": lambda: os.close(os.open(path, os.O_RDONLY)),
        "read": lambda: hashlib.sha256(os.fdopen(descriptor, "rb").read()).hexdigest(),
        "touch": lambda: hashlib.sha256(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)).hexdigest(),
    }
    print("asking", flush=True)
    outcome = operations[kind]()
    print(outcome if descriptor >= 0 else "done", flush=True)


if __name__ == "__main__":
    main()
