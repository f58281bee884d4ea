"""The components of a server, in groups while they are built, and the order in which they begin."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import trio

from trimsfs.control.commands import Commands
from trimsfs.control.control_files import Control
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.filesystem.filesystem import Filesystem
from trimsfs.gpu.copies import GpuCopies
from trimsfs.gpu.interface import GpuInterface
from trimsfs.integrity.digest_prefetch import DigestPrefetch
from trimsfs.integrity.integrity import Integrity
from trimsfs.integrity.signature_policy import SignaturePolicy
from trimsfs.models.derived_blobs import DerivedBlobs
from trimsfs.models.tensor_tables import TensorTables
from trimsfs.namespace.kept_listings import KeptListings
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.cold_open import ColdOpener
from trimsfs.opening.passthrough import Backing, Passthrough
from trimsfs.prefetch.prefetcher import Prefetcher
from trimsfs.stores import Retrying
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.tiers.host.tier import HostTier

Service = Callable[..., Awaitable[Any]]
"""Runs for as long as the server does, and tells when it has begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """Where the bytes of files are kept on this host, but for GPUs."""

    disk: DiskTier
    host: HostTier
    passthrough: Passthrough


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """What is known of the store's files, and their bytes."""

    retrying: Retrying
    kept_listings: KeptListings
    namespace: Namespace
    fetcher: Fetcher
    tables: TensorTables
    digest_prefetch: DigestPrefetch


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What a file has to pass before it is opened, and later."""

    integrity: Integrity
    cold_opener: ColdOpener
    signature_policy: SignaturePolicy | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """The copies of files on GPUs, and what lends them."""

    copies: GpuCopies
    interface: GpuInterface


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The components of a server.

    ``services`` run before the first request is answered. ``commands`` and ``maintenance`` evict, so they have to know
    what is open: they begin after a takeover.
    """

    disk: DiskTier
    host: HostTier
    passthrough: Passthrough
    breaker: CircuitBreaker
    fetcher: Fetcher
    namespace: Namespace
    derived: DerivedBlobs
    prefetcher: Prefetcher
    gpu: GpuCopies
    gpu_interface: GpuInterface
    integrity: Integrity
    commands: Commands
    control: Control
    filesystem: Filesystem
    services: tuple[Service, ...]
    maintenance: tuple[Service, ...]

    async def start(self, nursery: trio.Nursery) -> None:
        """Return when all that a request may need runs in a nursery."""
        for run in self.services:
            await nursery.start(run)

    def decide_passthrough(self, backing: Backing, refusal: str | None) -> None:
        """Have the kernel read the files of *backing* by itself, unless a *refusal* tells why it cannot."""
        if refusal is None:
            self.passthrough.enable(backing)
        else:
            self.passthrough.disable(refusal)

    async def take_over(self, *, unclaimed: Sequence[int]) -> None:
        """Go on with what the ledger tells of the server before; call `decide_passthrough` first.

        *unclaimed* are backing ids that the server before may not have heard of.
        """
        if self.passthrough.enabled:
            await self.passthrough.restore(unclaimed)
        await self.filesystem.takeover.restore()

    async def start_maintenance(self, nursery: trio.Nursery) -> None:
        """Carry out commands from now on, and let files be recorded, evicted and checked."""
        await nursery.start(self.commands.run)
        for run in self.maintenance:
            nursery.start_soon(run)
