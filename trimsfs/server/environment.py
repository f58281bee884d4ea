"""The environment of a server: its connections to the store, the keeper and the kernel."""

import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from trimsfs.fetch.copier import Copier
from trimsfs.fetch.store_requests import REQUEST_MEMORY
from trimsfs.handover.ledger import Ledger
from trimsfs.integrity.deferred import Pace
from trimsfs.integrity.manifests import ReadManifest
from trimsfs.stores.base import Store
from trimsfs.telemetry.histogram import Histogram
from trimsfs.types import CHUNK_SIZE


class DescriptorStore(Protocol):
    """Keeps descriptors, by number, and a listening socket beyond the life of a server: the keeper."""

    async def hold(self, number: int, descriptor: int) -> bool:
        """Store a descriptor; False when the keeper cannot."""

    def let_go(self, number: int, done: Callable[[], None]) -> None:
        """Close the descriptor soon, and then call *done*."""

    async def recall(self, number: int) -> int | None:
        """The stored descriptor with this number; None if there is none."""

    async def listen(self) -> tuple[Path, int] | None:
        """The path and the descriptor of a non-blocking socket, the same for each server; None if it cannot be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a server connects to in production, and tests replace.

    ``mounted_ns`` and ``started``, since the epoch, are when the mount and this server began. ``restarts`` counts
    earlier servers, and ``takeover_seconds`` is how long the mount was without one. ``lock`` is the descriptor of the
    cache directory's lock, from an earlier server. ``kept`` tells whether the keeper has not ended, and
    ``keeper_problem`` why it does nothing for this server. ``launched`` tells whether the keeper did not start this
    server itself: then the keeper outlives the mount. ``keeper`` keeps descriptors for the next server.

    ``store`` does not retry; ``copier`` moves its bytes. ``read_manifest`` reads signed manifests; it is None if
    signatures are off.

    ``invalidate`` makes the kernel look up a name in a directory's inode again, and must not block. ``prune`` lets it
    give up inodes that nothing uses. ``drop_pages`` makes it drop the pages of an inode, and must not block.
    ``forget_pages`` returns once it has dropped them. ``expire`` makes it look up names, as pairs of directory inode
    and name, at their next use. A worker thread calls the last two. ``waits`` returns whose requests are under way.
    ``server_pid`` and ``keeper_pid`` are as the keeper sees them. Tests set smaller chunks and requests, and another
    ``pace``.
    """

    mountpoint: Path
    mounted_ns: int
    started: float
    restarts: int
    keeper_pid: int
    keeper: DescriptorStore
    ledger: Ledger
    lock: int | None
    store: Store
    copier: Copier
    read_manifest: ReadManifest | None
    invalidate: Callable[[int, bytes], None]
    forget_pages: Callable[[int], None]
    expire: Callable[[Iterable[tuple[int, bytes]]], None]
    prune: Callable[[Sequence[int]], None]
    drop_pages: Callable[[int], None]
    chunk_size: int = CHUNK_SIZE
    request_memory: int = REQUEST_MEMORY
    kept: Callable[[], bool] = lambda: True
    keeper_problem: Callable[[], str | None] = lambda: None
    launched: bool = False
    waits: Callable[[], list[dict[str, object]]] = list
    pace: Pace = field(default_factory=Pace)
    server_pid: int = field(default_factory=os.getpid)
    takeover_seconds: Histogram = field(default_factory=Histogram)


def recovery_of(mountpoint: Path, *, launched: bool) -> str:
    """The command that starts another keeper of a mount; ``launched`` is as in `Environment`."""
    return f"mountctl {'keeper' if launched else 'recover'} {shlex.quote(str(mountpoint))}"
