"""Reads a file in a pod's control group, whose limits are below its size: ``python3 throttled.py PATH``, as root.

It needs Python and the command ``trimsfs`` alone, so that it also runs where nothing of this repository is. Each reader
has the directory of the file as a read-only volume in a mount namespace of its own, as in a pod. It reads the file
once, which is timed, and once more for its digest. It prints a `Reading` a line, as JSON.
"""

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
TIMEOUT_S = 600
PIECE = 1 << 20
PAGE = mmap.PAGESIZE
LIMIT = 40 << 20
"""Of a limited reader, in bytes."""
HIGH = LIMIT // 10 * 9
"""What the kubelet writes to memory.high of a container with this limit and a request of 0, if its MemoryQoS is on: its
memoryThrottlingFactor is 0.9."""
WAYS, STATES = ("read", "mapped"), ("cold", "warm")
LIMITS = ("none", "max", "high")
"""Of version 1 of control groups, which has no memory.high, the first two."""
_IN_POD = """
echo $$ > "$1"
mount --bind "$2" "$3"
mount -o remount,bind,ro "$3"
shift 3
exec "$@"
"""


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a program has read a file.

    ``way`` is by read(2) or mapped; ``state`` is cold, when the bytes come from the store, or warm, from the disk;
    ``limit`` is that of its group: none, max, or high, which is both. ``throttled`` is how often the kernel has held it
    back, or made room at the limit, and ``killed`` how many of the group it killed.
    """

    way: str
    state: str
    limit: str
    seconds: float
    digest: str
    throttled: int
    killed: int


def limits() -> tuple[str, ...]:
    """The LIMITS that this host's control groups have."""
    return LIMITS if _second() else LIMITS[:2]


def _second() -> bool:
    with contextlib.suppress(OSError):
        return "memory" in (ROOT / "cgroup.controllers").read_text().split()
    return False


@contextlib.contextmanager
def group(limit: str) -> Iterator[Path]:
    """A control group with a limit. Raises OSError where there can be none."""
    parent = ROOT if _second() else ROOT / "memory"
    if _second():
        (ROOT / "cgroup.subtree_control").write_text("+memory")
    made = parent / f"trimsfs-tests-{os.getpid()}"
    made.mkdir()
    try:
        if limit != "none":
            (made / ("memory.max" if _second() else "memory.limit_in_bytes")).write_text(str(LIMIT))
        if limit == "high":
            (made / "memory.high").write_text(str(HIGH))
        yield made
    finally:
        for _ in range(100):  # the kernel counts a process for a moment after its end
            with contextlib.suppress(OSError):
                made.rmdir()
                break
            time.sleep(0.05)


def counted(made: Path) -> tuple[int, int]:
    """How often the kernel acted on a group, and how many of its processes it killed."""
    name = "memory.events" if _second() else "memory.oom_control"
    events = {key: int(value) for key, value in map(str.split, (made / name).read_text().splitlines())}
    acted = events["high"] + events["max"] if _second() else int((made / "memory.failcnt").read_text())
    return acted, events["oom_kill"]


def reading(path: Path, way: str, state: str, limit: str) -> Reading:
    """Read a file once more. Raises OSError, and CalledProcessError if the reader fails."""
    command = ["trimsfs", "evict" if state == "cold" else "warm", path]
    subprocess.run(command, check=True, timeout=TIMEOUT_S, stdout=subprocess.DEVNULL)
    os.sync()  # the kernel drops no page that it has to write
    Path("/proc/sys/vm/drop_caches").write_text("1")
    with group(limit) as made, tempfile.TemporaryDirectory(prefix="trimsfs-tests-") as volume:
        reader = [sys.executable, __file__, "--way", way, str(Path(volume) / path.name)]
        pod = ["unshare", "--mount", "--propagation=slave", "sh", "-euc", _IN_POD, "-", str(made / "cgroup.procs")]
        done = subprocess.run(
            [*pod, str(path.parent), volume, *reader], check=True, timeout=TIMEOUT_S, capture_output=True, text=True
        )
        seconds, digest = done.stdout.split()
        throttled, killed = counted(made)
    return Reading(way, state, limit, float(seconds), digest, throttled, killed)


def read(path: str) -> str:
    """Read a file by read(2), which is timed; the seconds and the digest."""
    began = time.monotonic()
    with open(path, "rb", buffering=0) as file:
        piece = bytearray(PIECE)
        while file.readinto(piece):
            pass
        seconds = time.monotonic() - began
        file.seek(0)
        return f"{seconds} {hashlib.file_digest(file, 'sha256').hexdigest()}"


def mapped(path: str) -> str:
    """Read a byte of each page of a mapping, which is timed; the seconds and the digest."""
    began = time.monotonic()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        _ = mapping[::PAGE]
        return f"{time.monotonic() - began} {hashlib.sha256(mapping).hexdigest()}"


def checked(lines: str, digest: str, limits: Sequence[str]) -> str:
    """Check what was printed of a file with this digest; how many times as long readers with each of *limits* took."""
    readings = [Reading(**json.loads(line)) for line in lines.splitlines()]
    assert [(each.way, each.state, each.limit) for each in readings] == list(product(WAYS, STATES, limits))
    assert {each.digest for each in readings} == {digest}
    assert [each for each in readings if each.killed] == []
    limited = [each for each in readings if each.limit != "none"]
    for each in limited:  # of a cold one, the pages may be the server's
        assert each.throttled > 0 or each.state == "cold", each
    free = {(each.way, each.state): each.seconds for each in readings if each.limit == "none"}
    return "\n".join(
        f"{each.way}, {each.state}, {each.limit}: {each.seconds / free[each.way, each.state]:.1f} times as long, "
        f"throttled {each.throttled} times"
        for each in limited
    )


def main() -> None:
    match sys.argv[1:]:
        case ["--way", way, path]:
            print(read(path) if way == "read" else mapped(path))
        case [path]:
            for case in product(WAYS, STATES, limits()):
                print(json.dumps(dataclasses.asdict(reading(Path(path), *case))), flush=True)


if __name__ == "__main__":
    main()
