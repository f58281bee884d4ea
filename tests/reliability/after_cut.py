"""Looks at what a cut has left of a cache, as a host that boots does: ``python -m tests.reliability.after_cut ORDER``.

Run it in a mount namespace of its own: it has the kernel tell another boot. The order is a file of JSON, and so is what
it prints.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.reliability.logged_disk import mounted_image
from tests.support.mounts import MountedStore, mounted

BOOT_ID = "/proc/sys/kernel/random/boot_id"
FETCHED = "trimsfs_fetch_fetched_bytes_total"


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """The *image* that a cut has left, and what must be there: *sums* of all objects of the *store*, by name, and the
    names of those that were *whole* before the cut. *restored* are pinned files that were not: the server fetches what
    they lack by itself."""

    image: str
    store: str
    directory: str
    options: list[str]
    sums: dict[str, str]
    whole: list[str]
    restored: list[str]


@dataclass(slots=True, kw_only=True)
class Found:
    """Files that have *wrong* bytes, and how many bytes of the whole ones came from the store."""

    wrong: list[str] = field(default_factory=list)
    refetched: int = 0


def look(order: Order) -> Found:
    """Mount the image, and the store with the cache that the image has; read all."""
    directory = Path(order.directory)
    boot_id = directory / "boot_id"
    boot_id.write_text(f"{os.urandom(16).hex()}\n")
    subprocess.run(["mount", "--bind", boot_id, BOOT_ID], check=True)
    disk = directory / "disk"
    disk.mkdir()
    (directory / "cache").symlink_to(disk / "cache")
    with mounted_image(Path(order.image), disk), mounted(order.store, directory, *order.options) as mount:
        return _compare(order, mount)


def _compare(order: Order, mount: MountedStore) -> Found:
    found = Found()
    facts = [mount.info(name) for name in order.whole]
    missing = sum(each["size"] - each["residency"]["disk"] for each in facts)
    for name in order.restored:  # first: then all that comes is of the whole ones
        _compare_file(order, mount, name, found)
    before = mount.metrics()[FETCHED]
    for name in order.whole:
        _compare_file(order, mount, name, found)
    found.refetched = max(missing, int(mount.metrics()[FETCHED] - before))
    for name in order.sums.keys() - order.whole:
        _compare_file(order, mount, name, found)
    return found


def _compare_file(order: Order, mount: MountedStore, name: str, found: Found) -> None:
    if hashlib.sha256((mount.path / name).read_bytes()).hexdigest() != order.sums[name]:
        found.wrong.append(name)


def main(path: str) -> None:
    order: dict[str, Any] = json.loads(Path(path).read_text())
    print(json.dumps(asdict(look(Order(**order)))))


if __name__ == "__main__":
    main(*sys.argv[1:])
