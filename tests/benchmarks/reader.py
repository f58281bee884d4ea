"""One measurement in a process of its own: ``python -m tests.benchmarks.reader ACTION PATH``.

Prints ``ready``, acts when it is sent a line, and prints JSON: times in seconds, sizes in bytes. It keeps what it has
mapped and open until its input ends; after `scan`, each line is answered with the mapping's PSS and the file's page
cache.
"""

import argparse
import ctypes
import json
import math
import os
import random
import resource
import select
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")
FIRST = 4096
BLOCK = 1 << 20
FORGETTING_S = 0.1
"""Time for a server to hear of what the kernel has forgotten."""
ABSENT_BYTE = 0xFF
"""A byte that the benchmarks' files do not contain."""
_CACHESTAT = 451
"""The number of cachestat(2), which Linux has since 6.5."""
_PROT_READ, _MAP_SHARED, _MADV_POPULATE_READ = 1, 1, 22
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.memchr.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.memchr.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

Outcome = dict[str, float]


def read(path: str, options: argparse.Namespace) -> Outcome:
    """From open to the first bytes, and on to the last; if it is *known*, its name has been looked up before."""
    if options.known:
        os.stat(path)
    begun = time.perf_counter()
    buffer = memoryview(bytearray(BLOCK))
    descriptor = os.open(path, os.O_RDONLY)
    done = os.readv(descriptor, [buffer[:FIRST]])
    first = time.perf_counter()
    while count := os.readv(descriptor, [buffer]):
        done += count
    ended = time.perf_counter()
    os.close(descriptor)
    return {"first_s": first - begun, "seconds": ended - begun, "bytes": done}


def preads(path: str, _: argparse.Namespace) -> Outcome:
    """The whole file into one buffer, a MiB at a time."""
    buffer = bytearray(BLOCK)
    descriptor = os.open(path, os.O_RDONLY)
    begun = time.perf_counter()
    offset = 0
    while count := os.preadv(descriptor, [buffer], offset):
        offset += count
    return {"seconds": time.perf_counter() - begun, "bytes": offset}


def scan(path: str, _: argparse.Namespace) -> Outcome:
    """Map the file and read every byte of the mapping, by memchr(3) for a byte that is not there."""
    begun = time.perf_counter()
    # It stays open: another open would have some file systems drop the pages.
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    address = _map(descriptor, size)
    found = _libc.memchr(address, ABSENT_BYTE, size)
    ended = time.perf_counter()
    if found is not None:
        raise ValueError(f"{path} contains {ABSENT_BYTE:#x} at {found - address}")
    mapping = {"address": address, "descriptor": descriptor}
    return {"seconds": ended - begun, "begun": begun, "ended": ended, "bytes": size, **mapping}


def touch(path: str, _: argparse.Namespace) -> Outcome:
    """Map the file, which is open, and have the kernel enter every page into the page table."""
    descriptor = os.open(path, os.O_RDONLY)
    size = os.fstat(descriptor).st_size
    begun = time.perf_counter()
    address = _map(descriptor, size)
    if _libc.madvise(address, size, _MADV_POPULATE_READ) != 0:
        raise OSError(ctypes.get_errno(), "madvise")
    return {"seconds": time.perf_counter() - begun, "bytes": size}


def randoms(path: str, options: argparse.Namespace) -> Outcome:
    """4 KiB reads, uniform over the file."""
    buffer = bytearray(FIRST)
    descriptor = os.open(path, os.O_RDONLY)
    pages = os.fstat(descriptor).st_size // FIRST
    offsets = iter([page * FIRST for page in random.Random(5).choices(range(pages), k=options.count)])
    return _timed(lambda: os.preadv(descriptor, [buffer], next(offsets)), options)


def opens(path: str, options: argparse.Namespace) -> Outcome:
    """Open and close."""
    return _timed(lambda: os.close(os.open(path, os.O_RDONLY)), options)


def stats(path: str, options: argparse.Namespace) -> Outcome:
    """Stat by path."""
    return _timed(lambda: os.stat(path), options)


def lookups(path: str, options: argparse.Namespace) -> Outcome:
    """Stat a file whose name the kernel has just been made to forget, but not those of its directories."""
    times = []
    for _ in range(options.count):
        Path("/proc/sys/vm/drop_caches").write_text("2")
        time.sleep(FORGETTING_S)
        os.stat(os.path.dirname(path))
        times.append(_time(lambda: os.stat(path)))
    return _summary(times)


def fstats(path: str, options: argparse.Namespace) -> Outcome:
    """Stat by descriptor."""
    descriptor = os.open(path, os.O_RDONLY)
    return _timed(lambda: os.fstat(descriptor), options)


def opens_until_told(path: str, options: argparse.Namespace) -> Outcome:
    """Open and close until there is another line on standard input."""
    poll = select.poll()
    poll.register(sys.stdin, select.POLLIN)
    times = []
    while not poll.poll(0):
        times.append(_time(lambda: os.close(os.open(path, os.O_RDONLY))))
        time.sleep(options.sleep_s)
    sys.stdin.readline()
    return _summary(times)


def files(path: str, options: argparse.Namespace) -> Outcome:
    """Read every file of a directory, in order of name, by one or more threads."""
    begun = time.perf_counter()
    paths = sorted(entry.path for entry in os.scandir(path))
    if options.threads == 1:
        done = sum(map(_content, paths))
    else:
        with ThreadPoolExecutor(options.threads) as pool:
            done = sum(pool.map(_content, paths))
    return {"seconds": time.perf_counter() - begun, "bytes": done, "files": len(paths)}


def listing(path: str, _: argparse.Namespace) -> Outcome:
    """List a directory and stat every entry, as ``ls -l`` does."""
    begun = time.perf_counter()
    with os.scandir(path) as entries:
        sizes = [entry.stat(follow_symlinks=False).st_size for entry in entries]
    return {"seconds": time.perf_counter() - begun, "files": len(sizes)}


def cached(path: str, _: argparse.Namespace) -> Outcome:
    """Bytes that the page cache holds of all files below a directory."""
    done = 0
    for file in Path(path).rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                done += _cached(opened.fileno())
    return {"bytes": done}


def walk(path: str, options: argparse.Namespace) -> Outcome:
    """List all below a directory and stat every file, as ``ls -lR`` does; then stat some of them again, at random."""
    begun = time.perf_counter()
    paths = []
    for entry in below(path):
        entry.stat(follow_symlinks=False)
        paths.append(entry.path)
    seconds = time.perf_counter() - begun
    names = iter(random.Random(5).choices(paths, k=options.count))
    return {"seconds": seconds, "files": len(paths), "stat": _timed(lambda: os.stat(next(names)), options)["p50"]}


def hold(path: str, options: argparse.Namespace) -> Outcome:
    """Open files below a directory, those after the first that are to be skipped, and keep them open."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    paths = [entry.path for entry in islice(below(path), options.skip, options.skip + options.count)]
    times = [_time(partial(os.open, name, os.O_RDONLY)) for name in paths]
    return {"seconds": sum(times), "each": percentile(sorted(times), 0.5), "files": len(times)}


def peek(path: str, _: argparse.Namespace) -> Outcome:
    """Open a file and read a bit of its begin, its middle and its end."""
    begun = time.perf_counter()
    descriptor = os.open(path, os.O_RDONLY)
    opened = time.perf_counter()
    size = os.fstat(descriptor).st_size
    for offset in (0, size // 2 // FIRST * FIRST, size - FIRST):
        if len(os.pread(descriptor, FIRST, offset)) != FIRST:
            raise ValueError(f"{path} ends before {offset + FIRST}")
    return {"open": opened - begun, "reads": time.perf_counter() - opened}


ACTIONS: dict[str, Callable[[str, argparse.Namespace], Outcome]] = {
    function.__name__: function
    for function in (
        *(read, preads, scan, touch, randoms, opens, stats, lookups, fstats, opens_until_told, files, listing, cached),
        *(walk, hold, peek),
    )
}


def below(path: str) -> Iterator["os.DirEntry[str]"]:
    """The files below a directory, in order of name."""
    with os.scandir(path) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    for entry in listed:
        if entry.is_dir(follow_symlinks=False):
            yield from below(entry.path)
        else:
            yield entry


def percentile(sorted_values: list[float], share: float) -> float:
    """The least value that at least *share* of all values do not exceed."""
    return sorted_values[max(0, math.ceil(share * len(sorted_values)) - 1)]


def _map(descriptor: int, size: int) -> int:
    """The address of a mapping of a whole file."""
    address = _libc.mmap(None, size, _PROT_READ, _MAP_SHARED, descriptor, 0)
    if address == _MAP_FAILED:
        raise OSError(ctypes.get_errno(), "mmap")
    return int(address)


def _content(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    done = 0
    while piece := os.read(descriptor, BLOCK):
        done += len(piece)
    os.close(descriptor)
    return done


def _time(operation: Callable[[], object]) -> float:
    begun = time.perf_counter_ns()
    operation()
    return (time.perf_counter_ns() - begun) / 1e9


def _timed(operation: Callable[[], object], options: argparse.Namespace) -> Outcome:
    times = []
    for _ in range(options.count):
        if options.sleep_s:
            time.sleep(options.sleep_s)
        times.append(_time(operation))
    return _summary(times)


def _summary(times: list[float]) -> Outcome:
    times.sort()
    return {"p50": percentile(times, 0.5), "p99": percentile(times, 0.99), "max": times[-1], "count": len(times)}


def _cached(descriptor: int) -> int:
    """Bytes that the page cache holds of an open file."""
    whole, counts = (ctypes.c_uint64 * 2)(), (ctypes.c_uint64 * 5)()
    if _libc.syscall(_CACHESTAT, descriptor, whole, counts, 0) != 0:
        raise OSError(ctypes.get_errno(), "cachestat")
    return int(counts[0]) * PAGE


def _pss(address: int) -> int:
    """Bytes of the mapping at *address*, shared pages divided by the number of their mappings."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            fields = dict(next(lines).split()[:2] for _ in range(8))
            return int(fields["Pss:"]) * 1024
    raise LookupError(f"no mapping at {address:#x}")


def main() -> None:
    """Wait for the word, act, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("path")
    for name, default in (("count", 1), ("threads", 1), ("known", 0), ("skip", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sleep-s", type=float, default=0)
    options = parser.parse_args()
    print("ready", flush=True)
    sys.stdin.readline()
    outcome = ACTIONS[options.action](options.path, options)
    print(json.dumps(outcome), flush=True)
    for _ in sys.stdin:
        held = {"pss": _pss(int(outcome["address"])), "cached": _cached(int(outcome["descriptor"]))}
        print(json.dumps(held), flush=True)


if __name__ == "__main__":
    main()
