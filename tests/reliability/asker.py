"""One operation that waits for a mount: ``python asker.py KIND PATH`` says when it begins, and when it is done.

KIND is one of the operations below. What was read is told by its SHA-256.
"""

import hashlib
import mmap
import os
import sys


def main() -> None:
    kind, path = sys.argv[1:]
    if kind in {"read", "touch"}:
        descriptor = os.open(path, os.O_RDONLY)  # which must not wait
    print("asking", flush=True)
    told = "done"
    if kind == "list":
        os.listdir(path)
    elif kind == "stat":
        os.stat(path)
    elif kind == "attribute":
        os.getxattr(path, "user.trims.tensors")
    elif kind == "open":
        os.close(os.open(path, os.O_RDONLY))
    elif kind == "read":
        with os.fdopen(descriptor, "rb") as file:
            told = hashlib.sha256(file.read()).hexdigest()
    elif kind == "touch":
        with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as mapping:
            told = hashlib.sha256(mapping).hexdigest()
    print(told, flush=True)


if __name__ == "__main__":
    main()
