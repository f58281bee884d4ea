"""Alias targets: each process sees one target of an alias for its life, so that it never mixes two versions.

The processes that it starts see the same. FUSE names the thread that follows a link by its pid in the namespace in
which the file system was mounted. For a process outside of that namespace, the pid is 0: it always gets the newest
target.
"""

import json
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.processes import Process, container_of, exists, lineage, process_of

log = logging.getLogger(__name__)

MOST_PROCESSES = 10_000
"""Most processes that are remembered."""
LOOKS = 4
"""Processes that are looked at when another is remembered, to forget those that have ended."""
LAUNCHERS = frozenset(
    {
        "containerd",
        "crio",
        "dockerd",
        "init",
        "k3s-agent",
        "k3s-server",
        "kubelet",
        "kubelite",
        "nomad",
        "podman",
        "systemd",
    }
)
"""Programs that follow a path for what they start: what they saw once must not count for all that they start later."""


@dataclass(slots=True)
class _Seen:
    """The targets that a process has seen, by the path of the alias, and their slots in the ledger."""

    container: str | None
    targets: dict[str, str] = field(default_factory=dict)
    slots: list[int] = field(default_factory=list)


class AliasTargets:
    """Remembers which target of each alias a process has seen, until it has ended. Outlives servers in the ledger."""

    def __init__(self, ledger: Ledger, *, most: int = MOST_PROCESSES) -> None:
        self._ledger = ledger
        self._most = most
        self._seen = OrderedDict[Process, _Seen]()
        self._full = self._hidden = False
        """What was logged."""
        for record in ledger.inherited(RecordKind.ALIAS_TARGET):
            pid, started, container, path, target = json.loads(record.content)
            seen = self._seen.setdefault(Process(pid, started), _Seen(container))
            seen.targets[path] = target
            seen.slots.append(record.slot)

    def __len__(self) -> int:
        return len(self._seen)

    async def follow(self, path: str, thread: int, newest: Callable[[], Awaitable[str]]) -> str:
        """The target of the alias at a path for a thread: what its process sees, else the *newest*."""
        family = lineage(process_of(thread)) if thread else iter(())
        process, program = next(family, (None, ""))
        if process is None or program in LAUNCHERS:
            if process is None and thread and not self._hidden and exists(thread):
                self._hidden = True
                log.warning("/proc hides processes: their aliases move while they run: mount it without hidepid")
            return await newest()
        seen = self._seen.get(process)
        if seen is not None and path in seen.targets:
            return seen.targets[path]
        related = [process, *(ancestor for ancestor, _ in family)]
        target = self._known(path, related)
        if target is None:
            target = await newest()
            # Meanwhile another thread, one above it or one of its container may have got another answer.
            target = self._known(path, related) or target
        self._remember(process, path, target)
        return target

    def _known(self, path: str, related: list[Process]) -> str | None:
        """What a process, with those above it, sees: what one of these has seen, or one of its container."""
        for each in related:
            seen = self._seen.get(each)
            if seen is not None and path in seen.targets:
                return seen.targets[path]
        container = container_of(related[0].pid)
        if container is None:
            return None
        for each, seen in self._seen.items():
            if seen.container == container and path in seen.targets and each.runs:
                return seen.targets[path]
        return None

    def _remember(self, process: Process, path: str, target: str) -> None:
        seen = self._seen.get(process)
        if seen is None:
            self._make_room()
            seen = self._seen[process] = _Seen(container_of(process.pid))
        if path in seen.targets:
            return
        seen.targets[path] = target
        content = json.dumps((process.pid, process.started, seen.container, path, target)).encode()
        seen.slots.append(self._ledger.add(RecordKind.ALIAS_TARGET, process.pid, content))

    def _make_room(self) -> None:
        """Forget some processes that have ended and, at worst, the one that was looked at longest ago."""
        for _ in range(min(LOOKS, len(self._seen))):
            process = next(iter(self._seen))
            if process.runs:
                self._seen.move_to_end(process)
            else:
                self._forget(process)
        if len(self._seen) < self._most:
            return
        if not self._full:
            self._full = True
            log.warning(
                "more than %d processes use aliases: some may see another version of a model later: name versions",
                self._most,
            )
        self._forget(next(iter(self._seen)))

    def _forget(self, process: Process) -> None:
        for slot in self._seen.pop(process).slots:
            self._ledger.set_count(slot, 0)
