"""What the programs of this directory share.

They stand for a user's processes: plain framework code that is given a path. None of them knows
of the filesystem that may lie behind the path.
"""

import argparse
import hashlib
import json
import mmap
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

_VMA_HEADER = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def run(main: Callable[[], None]) -> None:
    """Run `main`; on an exception print one line on stderr and exit with status 1."""
    try:
        main()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        # MXNet puts the C++ stack trace before the message; the others put detail after it.
        message = lines[-1] if lines[0].startswith("Traceback") else lines[0]
        sys.exit(f"{Path(sys.argv[0]).name}: {type(error).__name__}: {message.strip()}")


def report(values: Mapping[str, object]) -> None:
    """Print `values` as one line of JSON, at once."""
    print(json.dumps(values), flush=True)


def digest(buffers: Iterable[memoryview]) -> str:
    """Return the SHA-256 of the bytes of contiguous buffers, one after the other."""
    sha256 = hashlib.sha256()
    for buffer in buffers:
        sha256.update(buffer.cast("B"))
    return sha256.hexdigest()


def seeded_array(shape: tuple[int, ...], seed: int = 0) -> npt.NDArray[np.float32]:
    """Return float32 values from a normal distribution, the same for the same arguments."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def residency(mapping: mmap.mmap) -> dict[str, int]:
    """Return how much of a mapping is resident in this process, in KiB.

    `rss_kib` counts each resident page whole; `pss_kib` divides it by the number of processes
    that map it.
    """
    totals = {"rss_kib": 0, "pss_kib": 0}
    start: int = np.frombuffer(mapping, np.uint8).ctypes.data
    end = start + -(-len(mapping) // mmap.PAGESIZE) * mmap.PAGESIZE
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := _VMA_HEADER.match(line):
            inside = start <= int(header[1], 16) and int(header[2], 16) <= end
        elif inside and line.startswith(("Rss:", "Pss:")):
            totals[f"{line[:3].lower()}_kib"] += int(line.split()[1])
    return totals


def all_kib(*fields: str) -> int:
    """Return the sum of fields of smaps, in KiB, of all of this process's memory."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in fields)


def mapped_kib(directory: Path, *fields: str) -> dict[str, int]:
    """Return fields of smaps, in KiB, summed over this process's mappings of files below a directory."""
    totals = dict.fromkeys(fields, 0)
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, _, rest = line.partition(":")
        if _VMA_HEADER.match(line):
            inside = f" {directory}/" in line
        elif inside and field in totals:
            totals[field] += int(rest.split()[0])
    return totals


def directory_argument(description: str | None) -> Path:
    """The one argument of a program."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    return directory


def report_mapped(results: Mapping[str, object], path: Path) -> None:
    """Map a whole file read-only and shared, read a byte of every page, and report the results with its residency.

    The measuring waits for a line on standard input and the end for its end, so that a parent can have several
    processes measure while all of them map the file.
    """
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    np.frombuffer(mapping, np.uint8)[:: mmap.PAGESIZE].max()
    report({"ready": True})
    if not sys.stdin.readline():
        raise RuntimeError("stdin was closed before a line came")
    report({**results, **residency(mapping), "own_kib": all_kib("Private_Dirty", "Private_Clean")})
    sys.stdin.read()


def build(directory: Path, names: Sequence[str], write: Callable[[Path], None]) -> None:
    """Have `write` fill `directory` with the files `names`, unless all are there; report sizes.

    The files are written in a hidden directory beside `directory`, which a killed build leaves behind, and moved when
    all are finished. So no file in `directory` is ever half written.
    """
    directory = directory.resolve()
    start = time.perf_counter()
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as scratch:
            write(Path(scratch))
            for name in names:
                # safetensors and onnx make files that only their owner may read.
                Path(scratch, name).chmod(0o644)
                Path(scratch, name).rename(directory / name)
    report(
        {
            "built": bool(missing),
            "build_s": round(time.perf_counter() - start, 3),
            "bytes": {name: (directory / name).stat().st_size for name in names},
        }
    )
