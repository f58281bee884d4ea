"""Reports: the contents of control files on models, jobs, GPU copies, the mount and its metrics."""

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice

import trio
from cachetools import LRUCache

from trimsfs.control.authorisation import Authorisation, Caller
from trimsfs.control.extra import Extra
from trimsfs.control.handle import ControlHandle, Lines, as_json
from trimsfs.control.inventory import Inventory
from trimsfs.control.jobs import Jobs
from trimsfs.errors import NotPermittedError, StoreAccessError
from trimsfs.namespace.inodes import Inode
from trimsfs.namespace.listing import Entry
from trimsfs.opening.passthrough import Passthrough
from trimsfs.telemetry.open_trace import OpenTrace
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.deduplication import Deduplication
from trimsfs.tiers.disk.interfaces import KnownBlobs, Residencies, Residency
from trimsfs.types import Generation

OPERATORS_LABELS = (b'{tenant="', b'{model="', b'{store="')
"""The labels of metrics that tell what others read."""


REST, LONGEST_REST_S = 4, 10.0
"""How many times as long as a report has taken its user waits for the next, and for how long at most."""
AT_ONCE = 25
"""Files of a report without a pause: other requests wait for less than a millisecond."""
MOST_USERS = 1024
"""Users whose last reports are remembered."""


@dataclass(slots=True)
class _Turn:
    """Whether a user is given a report now, and until when the next one waits."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    rests_until: float = -math.inf


class Reports:
    """Makes the contents of control files. Callers learn only of files that they may read.

    *facts* returns facts about the mount, *metrics* renders all statistics. *links* and *entries* are of `Namespace`,
    *traces* of `Tracer`. *may_tell* returns whether a tenant may learn what is cached of a content.
    """

    def __init__(
        self,
        blobs: KnownBlobs,
        residencies: Residencies,
        passthrough: Passthrough,
        deduplication: Deduplication,
        extras: Sequence[Extra],
        authorisation: Authorisation,
        jobs: Jobs,
        *,
        metrics: Callable[[], Iterator[bytes]],
        facts: Callable[[], dict[str, object]],
        links: Callable[[], Iterable[Generation]],
        entries: Callable[[str], Awaitable[Mapping[bytes, Entry]]],
        traces: Callable[[], Iterator[OpenTrace]],
        may_tell: Callable[[Generation], bool] = lambda _: True,
    ) -> None:
        self._blobs = blobs
        self._residencies = residencies
        self._passthrough = passthrough
        self._deduplication = deduplication
        self._extras = extras
        self._authorisation = authorisation
        self._jobs = jobs
        self._render_metrics = metrics
        self._facts = facts
        self._links = links
        self._entries = entries
        self._traces = traces
        self._tenant_may_tell = may_tell
        self._turns = LRUCache[int, _Turn](MOST_USERS)

    async def info(self, inode: Inode, caller: Caller) -> bytes:
        """What is cached of a file, or of each file below a directory."""
        if inode.generation is not None:
            return as_json(self._model(await self._residencies.of(inode.generation)))
        return await self.models(inode.path, caller)

    async def models(self, prefix: str, caller: Caller) -> bytes:
        """What is cached of the objects below a prefix that the caller may read."""
        async with self._turn(caller):
            return await self._models(prefix, caller)

    @asynccontextmanager
    async def _turn(self, caller: Caller) -> AsyncIterator[None]:
        """A block that takes the server long. A user has one at a time, and a rest after it. So opens do not wait for
        what users ask for again and again, and users do not wait for each other."""
        turn = self._turns.setdefault(caller.uid, _Turn())
        async with turn.lock:
            await trio.sleep_until(turn.rests_until)
            began = trio.current_time()
            try:
                yield
            finally:
                now = trio.current_time()
                turn.rests_until = now + min(REST * (now - began), LONGEST_REST_S)

    async def _models(self, prefix: str, caller: Caller) -> bytes:
        links: dict[tuple[str, str], set[Generation]] = {}
        for link in self._links():
            links.setdefault((link.file, link.etag), set()).add(link)
        residencies, pieces = iter(await self._here()), list[bytes]()
        while some := list(islice(residencies, AT_ONCE)):  # many take seconds: opens must not wait for so long
            below = [
                replace(here, generation=name)
                for here in some
                for name in {here.generation} | links.get((here.generation.file, here.generation.etag), set())
                if name.key.startswith(prefix) and self._may_learn(name, caller)
            ]
            pieces += [as_json(self._model(here)).rstrip() for here in below]
            await trio.lowlevel.checkpoint()
        return b'{"path": %b, "models": [%b]}\n' % (as_json(prefix).rstrip(), b", ".join(pieces))

    async def _here(self) -> list[Residency]:
        """What is cached of all objects; the newest of several generations of a path is the last."""
        on_disk = await self._residencies.all()
        elsewhere = {token: each for extra in self._extras for token, each in extra.generations().items()}
        absent = elsewhere.keys() - {here.token for here in on_disk}
        return [*[await self._residencies.of(elsewhere[token]) for token in absent], *on_disk]

    async def inventory(self, path: str, caller: Caller) -> Inventory:
        """All files below a directory, with what is cached of those that the caller may read.

        Raises StoreAccessError if the caller may not list the directory.
        """
        if not self._authorisation.may_list(path, caller):
            raise StoreAccessError(f"/{path}: uid {caller.uid} may not list it")
        async with self._turn(caller):
            by_token = {here.token: here for here in await self._here()}

        def here(generation: Generation) -> dict[str, object] | None:
            known = by_token.get(self._blobs.token(generation)) if by_token else None
            if known is None or not self._may_learn(generation, caller):
                return None
            return self._model(replace(known, generation=generation))

        return Inventory(path, self._entries, here, lambda below: self._authorisation.may_list(below, caller))

    def _may_learn(self, generation: Generation, caller: Caller) -> bool:
        """Whether a caller may learn what is cached of a file."""
        may_tell = self._tenant_may_tell(generation) or self._authorisation.may_command(caller)
        return may_tell and self._authorisation.may_read(generation.key, caller)

    def jobs(self, inode: Inode, caller: Caller) -> bytes:
        """The jobs below a directory: all, for a caller who may command, else those for paths that they may read."""
        jobs = [
            job.facts()
            for job in self._jobs.below(inode.path)
            if self._authorisation.may_command(caller) or self._authorisation.may_read(job.order.path, caller)
        ]
        return as_json({"path": inode.path, "jobs": jobs})

    async def shared(self, inode: Inode, caller: Caller) -> bytes:
        """What a model shares with others that the caller may learn of."""
        assert inode.generation is not None
        may_tell = partial(self._may_tell, caller, inode.path)
        return as_json(await self._deduplication.shared_with(inode.generation, may_tell))

    def _may_tell(self, caller: Caller, path: str, blob: Blob) -> bool:
        """Whether a blob is ready to be mapped and the caller may learn of it.

        A container's root may read all files, so it learns of a tenant's model only at a path of the same tenant.
        """
        key = blob.generation.key
        same_tenant = self._authorisation.same_tenant(key, path)
        return same_tenant and self._passthrough.ready(blob) and self._authorisation.may_read(key, caller)

    async def metrics(self, caller: Caller) -> bytes:
        """All statistics as Prometheus text; those of tenants, models and stores only for who may command."""
        pieces = []
        for piece in self._render_metrics():
            pieces.append(piece)
            await trio.lowlevel.checkpoint()  # all of them take milliseconds: opens must not wait for so long
        text = b"".join(pieces)
        if not self._authorisation.may_command(caller):
            lines = text.splitlines(keepends=True)
            text = b"".join(line for line in lines if not any(label in line for label in OPERATORS_LABELS))
        return text

    def traces(self, caller: Caller) -> ControlHandle:
        """The traces of the last cold opens, one a line, for who may command. Raises NotPermittedError."""
        if not self._authorisation.may_command(caller):
            raise NotPermittedError(f"traces: uid {caller.uid} may not command this mount")
        return Lines(trace.facts() for trace in self._traces())

    async def mount(self, caller: Caller) -> bytes:
        """Facts about the mount; its options, and who waits for what, for who may command.

        Files in quarantine are those that the caller may read.
        """
        facts = self._facts()
        quarantined = [blob.generation for blob in self._blobs if blob.health.quarantined]
        damaged = [generation for generation in quarantined if self._may_learn(generation, caller)]
        facts["quarantine"] = names = sorted(_shown(generation.key) for generation in damaged)
        facts["quarantine_problem"] = f"in quarantine: {', '.join(names)}" if names else None
        if not self._authorisation.may_command(caller):
            secret = {"options", "waits", "stores"}  # they name tenants, and what others read
            facts = {name: fact for name, fact in facts.items() if name not in secret}
        return as_json(facts)

    async def of_extra(self, extra: Extra, caller: Caller) -> bytes:
        """What an extra has of files that the caller may read. Of other users, only who may command learns."""
        uid = None if self._authorisation.may_command(caller) else caller.uid
        return as_json(extra.report(lambda generation: self._authorisation.may_read(generation.key, caller), uid))

    def _model(self, here: Residency) -> dict[str, object]:
        generation, blob = here.generation, self._blobs.known(here.token)
        return {
            "path": _shown(generation.key),
            "size": generation.size,
            "generation": here.token,
            "etag": generation.etag,
            "version_id": generation.version_id,
            "modified": generation.modified_ns / 1e9,
            "residency": self.residency(here),
            "verified": here.verified,
            "quarantined": blob is not None and blob.health.quarantined,
            "digest": here.digest or None,
            "passthrough": self._passthrough.has(generation),
            "pinned": here.pinned,
            "open": here.handles,
            "uses": here.uses,
            "last_used": here.last_used or None,
        }

    def residency(self, here: Residency) -> dict[str, object]:
        """The bytes of a file in each tier."""
        bytes_by_tier: dict[str, object] = {"disk": here.disk_bytes, "host": here.host_bytes}
        for extra in self._extras:
            bytes_by_tier |= extra.resident(here.generation)
        return bytes_by_tier


def _shown(key: str) -> str:
    """A key as text that JSON can hold."""
    return key.encode(errors="surrogateescape").decode(errors="replace")
