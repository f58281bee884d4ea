"""The components of a server: in groups while assembly builds them, then the order in which they start."""

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from trimsfs.control.commands import Commands
from trimsfs.control.control_files import Control
from trimsfs.control.extra import Extra, Service
from trimsfs.control.tensor_tables import TensorTables
from trimsfs.fetch.bypass import EarlyHeads
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.filesystem.filesystem import Filesystem
from trimsfs.filesystem.rights import Rights
from trimsfs.handover.connection_settings import ConnectionSettings
from trimsfs.integrity.digest_prefetch import DigestPrefetch
from trimsfs.integrity.integrity import Integrity
from trimsfs.integrity.signature_policy import SignaturePolicy
from trimsfs.namespace.kept_listings import KeptListings
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.cold_open import ColdOpener
from trimsfs.opening.passthrough import Backing, Passthrough
from trimsfs.origins import ByPath
from trimsfs.prefetch.prefetcher import Prefetcher
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.stores.retrying import Retrying
from trimsfs.tiers.disk.disk_tier import DiskTier
from trimsfs.tiers.host.memory_tier import HostTier


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """The disk tier, the memory tier, and passthrough."""

    disk: DiskTier
    host: HostTier
    passthrough: Passthrough


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetching:
    """The components that ask the store for names, bytes and digests."""

    retrying: ByPath[Retrying]
    breakers: ByPath[CircuitBreaker]
    kept_listings: KeptListings
    namespace: Namespace
    fetcher: Fetcher
    early_heads: EarlyHeads | None
    tables: TensorTables
    digest_prefetch: DigestPrefetch
    rights: Rights | None

    @property
    def several(self) -> bool:
        """Whether stores or credentials are at paths, instead of one for all of the mount."""
        return [path for path, _ in self.breakers.items()] != [""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """The components that check a file before a program may open it, and later."""

    integrity: Integrity
    cold_opener: ColdOpener
    signature_policy: SignaturePolicy | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """The components of a server.

    ``services`` start before the server answers its first request. ``commands`` and ``maintenance`` may evict, so they
    start after a takeover has restored what is open.
    """

    disk: DiskTier
    host: HostTier
    passthrough: Passthrough
    breakers: ByPath[CircuitBreaker]
    fetcher: Fetcher
    namespace: Namespace
    prefetcher: Prefetcher
    extras: tuple[Extra, ...]
    integrity: Integrity
    commands: Commands
    control: Control
    filesystem: Filesystem
    services: tuple[Service, ...]
    maintenance: tuple[Service, ...]

    async def start(self, nursery: trio.Nursery) -> None:
        """Start the services in a nursery; return when all are ready for requests."""
        for run in self.services:
            await nursery.start(run)

    def decide_modes(self, backing: Backing, settings: ConnectionSettings) -> None:
        """Enable the modes of opens that the kernel has agreed to: passthrough, with *backing*, and direct reads."""
        if settings.refusal is None:
            self.passthrough.enable(backing)
        else:
            self.passthrough.disable(settings.refusal)
        self.filesystem.files.direct = settings.direct

    async def take_over(self, *, unclaimed: Sequence[int]) -> None:
        """Restore the previous server's state from the ledger; call `decide_modes` first.

        *unclaimed* are backing ids that the previous server may not have received.
        """
        if self.passthrough.enabled:
            await self.passthrough.restore(unclaimed)
        await self.passthrough.restore_quarantine()
        await self.filesystem.restore()

    async def start_maintenance(self, nursery: trio.Nursery) -> None:
        """Start carrying out commands, and recording, evicting and checking files."""
        await nursery.start(self.commands.run)
        for run in self.maintenance:
            nursery.start_soon(run)
