"""How many bytes this process may still lock, by the memory limits of its control groups (v1 and v2)."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
RESERVE = 64 << 20
"""Bytes left unlocked: reads and writes need memory too."""


def lockable_bytes(root: Path = ROOT, own: Path = OWN) -> int | None:
    """Bytes that may still be locked before the kernel's OOM killer acts; None without a limit."""
    left = [limit - used for limit, used in _limits(root, own)]
    return max(0, min(left) - RESERVE) if left else None


def _limits(root: Path, own: Path) -> Iterator[tuple[int, int]]:
    """The limit of each group that has one, and the bytes in it that the kernel cannot reclaim."""
    # Groups may have all names without a newline, also with other ends of lines and bytes that are no text.
    with suppress(OSError), own.open(newline="\n", errors="surrogateescape") as groups:
        for line in groups:
            _, controllers, path = line.removesuffix("\n").split(":", 2)
            if controllers == "":
                yield from _of(root, path, "memory.max", ("anon", "unevictable"))
            elif "memory" in controllers.split(","):
                names = ("total_rss", "total_unevictable")
                yield from _of(root / "memory", path, "memory.limit_in_bytes", names)


def _of(root: Path, path: str, limit: str, unreclaimable: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """The limits of a group and its visible ancestors: a container may see its own group as the root."""
    group = root / path.lstrip("/")
    for directory in (group, *(above for above in group.parents if above == root or root in above.parents)):
        with suppress(OSError, ValueError):
            most = int((directory / limit).read_text())  # "max" is no limit: ValueError
            counters = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
            yield most, sum(int(counters[name]) for name in unreclaimable)
