"""One thing done with the driver in a process of its own: ``python -m tests.benchmarks.gpu.device ACTION``.

Prints ``ready``, acts when it is sent a line, and prints JSON: times in seconds, sizes in bytes.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cuda.bindings import driver

from trimsfs.extras.gpu import cuda

BLOCK = 8 << 20
BUFFERS = 8
"""The ring: as many pinned buffers as trimsfs has, of the same size."""
STREAMS = 2
READERS = 4

Act = Callable[[], dict[str, Any]]


def facts(_: argparse.Namespace) -> Act:
    """What the driver tells of the first device."""

    def act() -> dict[str, Any]:
        found = cuda.devices()[0]
        domain, bus, slot = (_attribute(f"PCI_{name}_ID") for name in ("DOMAIN", "BUS", "DEVICE"))
        version = cuda.call("cuDriverGetVersion")
        with cuda.Context(found.ordinal):
            free, _ = cuda.free_and_total()
        return {
            "uuid": found.uuid,
            "name": found.name,
            "total": found.total,
            "free": free,
            "capability": ".".join(str(_attribute(f"COMPUTE_CAPABILITY_{part}")) for part in ("MAJOR", "MINOR")),
            "cuda": f"{version // 1000}.{version % 1000 // 10}",
            "pci": f"{domain:04x}:{bus:02x}:{slot:02x}.0",
        }

    return act


def _attribute(name: str) -> int:
    attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(cuda.call("cuDeviceGetAttribute", attribute, cuda.call("cuDeviceGet", 0)))


def lease(options: argparse.Namespace) -> Act:
    """Open a control file of a copy, and read it: the copy is there."""

    def act() -> dict[str, Any]:
        begun = time.perf_counter()
        told = json.loads(_content(options.path))
        return {"seconds": time.perf_counter() - begun, "nbytes": told["nbytes"]}

    return act


def command(options: argparse.Namespace) -> Act:
    """Give a command by its control file, and wait for its end."""

    def act() -> dict[str, Any]:
        begun = time.perf_counter()
        last = json.loads(_content(options.path).splitlines()[-1])
        seconds = time.perf_counter() - begun
        if last["state"] != "done":
            raise RuntimeError(f"{options.path}: {last}")
        return {"seconds": seconds}

    return act


def _content(path: Path) -> bytes:
    with path.open("rb", buffering=0) as file:
        return file.read()


def memory(_: argparse.Namespace) -> Act:
    """Bytes of the first device that nobody uses. Has a context of its own, before and after."""
    _enter()
    return lambda: {"free": cuda.free_and_total()[0]}


def copy(options: argparse.Namespace) -> Act:
    """Copy as many bytes as a file has to the device, through a ring of pinned memory that has any bytes in it."""
    return _copy(options.path, read=False)


def copy_file(options: argparse.Namespace) -> Act:
    """Copy a file to the device, read into the ring by several threads."""
    return _copy(options.path, read=True)


def _copy(path: Path, *, read: bool) -> Act:
    """Two halves of the ring take turns, each with a stream: one is filled while the other is copied."""
    ordinal = _enter()
    descriptor, size = os.open(path, os.O_RDONLY), path.stat().st_size
    buffers = [cuda.PinnedBuffer(BLOCK) for _ in range(BUFFERS)]
    half = BUFFERS // STREAMS
    turns = [(cuda.Stream(), buffers[half * turn : half * (turn + 1)]) for turn in range(STREAMS)]
    pool = ThreadPoolExecutor(READERS)

    def fill(buffer: cuda.PinnedBuffer, offset: int, length: int) -> None:
        done = 0
        while done < length:
            done += os.preadv(descriptor, [buffer.view[done:length]], offset + done)

    for buffer in buffers:  # so that there are threads, and pages
        pool.submit(fill, buffer, 0, min(size, BLOCK)).result()

    def act() -> dict[str, Any]:
        begun = time.perf_counter()
        target = cuda.VmmMemory.allocate(ordinal, size)
        allocated = time.perf_counter()
        for turn, start in enumerate(range(0, size, half * BLOCK)):
            stream, ring = turns[turn % STREAMS]
            stream.synchronize()
            offsets = range(start, min(size, start + half * BLOCK), BLOCK)
            pieces = [(buffer, at, min(BLOCK, size - at)) for buffer, at in zip(ring, offsets, strict=False)]
            for piece, filled in [(piece, pool.submit(fill, *piece) if read else None) for piece in pieces]:
                if filled is not None:
                    filled.result()
                buffer, at, length = piece
                stream.to_device(target.address + at, buffer.address, length)
        for stream, _ in turns:
            stream.synchronize()
        ended = time.perf_counter()
        if read:
            _check(target, descriptor, size, *turns[0])
        return {"seconds": ended - allocated, "allocate_s": allocated - begun}

    return act


def _check(
    target: cuda.VmmMemory, descriptor: int, size: int, stream: cuda.Stream, ring: list[cuda.PinnedBuffer]
) -> None:
    """See that the last bytes of the file are on the device. Raises ValueError."""
    length = min(size, BLOCK)
    stream.to_host(ring[0].address, target.address + size - length, length)
    stream.synchronize()
    if os.pread(descriptor, length, size - length) != ring[0].view[:length]:
        raise ValueError("what was copied is not what the file has")


def _enter() -> int:
    """Make the context of the first device current; its place."""
    ordinal = cuda.devices()[0].ordinal
    cuda.Context(ordinal).enter()
    return ordinal


ACTIONS: dict[str, Callable[[argparse.Namespace], Act]] = {
    function.__name__: function for function in (facts, lease, command, memory, copy, copy_file)
}


def main() -> None:
    """Prepare, then act and print at each line, until there are no more."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=ACTIONS)
    parser.add_argument("path", type=Path, nargs="?")
    options = parser.parse_args()
    act = ACTIONS[options.action](options)
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(act()), flush=True)


if __name__ == "__main__":
    main()
