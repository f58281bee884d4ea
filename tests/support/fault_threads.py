"""Map files one after the other, fault their pages from many threads at once, print the SHA-256 of what they saw.

``python fault_threads.py THREADS FILE...``: a process of its own, so that a fault that hangs can be timed out.
"""

import ctypes
import hashlib
import mmap
import sys
import threading


def main() -> None:
    threads = int(sys.argv[1])
    for path in sys.argv[2:]:
        print(faulted(path, threads), flush=True)


def faulted(path: str, threads: int) -> str:
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    size = len(mapping)
    source = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    target = ctypes.create_string_buffer(size)
    start = threading.Barrier(threads)

    def fault(number: int) -> None:
        start.wait()
        # From the far end, so that the kernel's read-ahead guesses wrong. ctypes gives up the GIL: faults overlap.
        for page in reversed(range(number * mmap.PAGESIZE, size, threads * mmap.PAGESIZE)):
            length = min(mmap.PAGESIZE, size - page)
            LIBC.memcpy(ctypes.addressof(target) + page, source + page, length)

    workers = [threading.Thread(target=fault, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return hashlib.sha256(target.raw[:size]).hexdigest()


LIBC = ctypes.CDLL(None)
LIBC.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
LIBC.memcpy.restype = ctypes.c_void_p

if __name__ == "__main__":
    main()
