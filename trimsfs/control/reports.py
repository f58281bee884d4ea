"""What the control files tell, as JSON: models, jobs, copies on GPUs, facts about the mount, metrics."""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial

from trimsfs.control.authorisation import Authorisation, Caller
from trimsfs.control.handle import as_json
from trimsfs.control.inventory import Inventory
from trimsfs.control.jobs import Jobs
from trimsfs.errors import StoreAccessError
from trimsfs.gpu.interface import GpuInterface
from trimsfs.namespace.inodes import Inode
from trimsfs.namespace.listing import Entry
from trimsfs.opening.passthrough import Passthrough
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.deduplication import Deduplication
from trimsfs.tiers.disk.residency import Residency
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.types import Generation


class Reports:
    """Makes the contents of control files, for a caller who learns only of the files that he may read.

    *facts* tells about the mount, *metrics* renders the statistics of all components, *links* and *entries* are as of
    `Namespace`.
    """

    def __init__(
        self,
        disk: DiskTier,
        passthrough: Passthrough,
        deduplication: Deduplication,
        gpu: GpuInterface,
        authorisation: Authorisation,
        jobs: Jobs,
        *,
        metrics: Callable[[], bytes],
        facts: Callable[[], dict[str, object]],
        links: Callable[[], Iterable[Generation]],
        entries: Callable[[str], Awaitable[Mapping[bytes, Entry]]],
    ) -> None:
        self._disk = disk
        self._passthrough = passthrough
        self._deduplication = deduplication
        self._gpu = gpu
        self._authorisation = authorisation
        self._jobs = jobs
        self._render_metrics = metrics
        self._facts = facts
        self._links = links
        self._entries = entries

    async def info(self, inode: Inode, caller: Caller) -> bytes:
        """What is here of a file, or of each file below a directory."""
        if inode.generation is not None:
            return as_json(self._model(await self._disk.residency(inode.generation)))
        return await self.models(inode.path, caller)

    async def models(self, prefix: str, caller: Caller) -> bytes:
        """What is here of the objects below a prefix that the caller may read."""
        links: dict[tuple[str, str], set[Generation]] = {}
        for link in self._links():
            links.setdefault((link.file, link.etag), set()).add(link)
        below = [
            replace(here, generation=name)
            for here in await self._here()
            for name in {here.generation} | links.get((here.generation.file, here.generation.etag), set())
            if name.key.startswith(prefix) and self._authorisation.may_read(name.key, caller)
        ]
        return as_json({"path": prefix, "models": [self._model(here) for here in below]})

    async def _here(self) -> list[Residency]:
        """What is here of all objects; of a path that is here in several contents, the last is the newest."""
        on_disk = await self._disk.residencies()
        on_gpu = self._gpu.generations()
        absent = on_gpu.keys() - {here.token for here in on_disk}
        return [*[await self._disk.residency(on_gpu[token]) for token in absent], *on_disk]

    async def inventory(self, path: str, caller: Caller) -> Inventory:
        """All files below a directory, of which what is here is told of those that the caller may read."""
        if not self._authorisation.may_list(path, caller):
            raise StoreAccessError(f"files of /{path}: uid {caller.uid} may not list it")
        found = {here.token: here for here in await self._here()}

        def here(generation: Generation) -> dict[str, object] | None:
            known = found.get(generation.token(self._disk.store)) if found else None
            if known is None or not self._authorisation.may_read(generation.key, caller):
                return None
            return self._model(replace(known, generation=generation))

        return Inventory(path, self._entries, here, lambda below: self._authorisation.may_list(below, caller))

    def jobs(self, inode: Inode, caller: Caller) -> bytes:
        """The jobs below a directory, about what the caller may read."""
        jobs = [
            job.facts()
            for job in self._jobs.below(inode.path)
            if self._authorisation.may_command(caller) or self._authorisation.may_read(job.order.path, caller)
        ]
        return as_json({"path": inode.path, "jobs": jobs})

    async def shared(self, inode: Inode, caller: Caller) -> bytes:
        """What a model has in common with others that the caller may learn of."""
        assert inode.generation is not None
        may_tell = partial(self._may_tell, caller, inode.path)
        return as_json(await self._deduplication.shared_with(inode.generation, may_tell))

    def _may_tell(self, caller: Caller, path: str, blob: Blob) -> bool:
        """Whether a caller may learn of a blob that is ready to be mapped. A container's root may read all files, but
        learns of a tenant's model only at the path of another one of that tenant."""
        key = blob.generation.key
        same_tenant = self._authorisation.same_tenant(key, path)
        return same_tenant and self._passthrough.ready(blob) and self._authorisation.may_read(key, caller)

    async def metrics(self, caller: Caller) -> bytes:
        """The statistics of all components as Prometheus text; those of tenants for who may command."""
        text = self._render_metrics()
        if not self._authorisation.may_command(caller):
            text = b"".join(line for line in text.splitlines(keepends=True) if b'{tenant="' not in line)
        return text

    async def mount(self, caller: Caller) -> bytes:
        """Facts about the mount; its options for who may command."""
        facts = self._facts()
        if not self._authorisation.may_command(caller):
            facts = {name: fact for name, fact in facts.items() if name != "options"}  # it names tenants
        return as_json(facts)

    async def gpu_copies(self, caller: Caller) -> bytes:
        """The copies of files that the caller may read, and who uses them, as far as that is the caller's affair."""
        uid = None if self._authorisation.may_command(caller) else caller.uid
        devices = self._gpu.copies(lambda generation: self._authorisation.may_read(generation.key, caller), uid)
        return as_json({"devices": devices})

    def _model(self, here: Residency) -> dict[str, object]:
        generation = here.generation
        return {
            "path": generation.key.encode(errors="surrogateescape").decode(errors="replace"),
            "size": generation.size,
            "generation": here.token,
            "etag": generation.etag,
            "version_id": generation.version_id,
            "modified": generation.modified_ns / 1e9,
            "residency": self.residency(here),
            "verified": here.verified,
            "digest": here.digest or None,
            "passthrough": self._passthrough.has(generation),
            "pinned": here.pinned,
            "open": here.handles,
            "uses": here.uses,
            "last_used": here.last_used or None,
        }

    def residency(self, here: Residency) -> dict[str, object]:
        """The bytes of a file in each tier."""
        return {"disk": here.disk_bytes, "host": here.host_bytes, "gpu": self._gpu.resident(here.generation)}
