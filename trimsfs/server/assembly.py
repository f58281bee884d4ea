"""The components of a server, put together."""

import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from trimsfs import __version__
from trimsfs.control import metrics
from trimsfs.control.commands import Commands
from trimsfs.control.files import Control
from trimsfs.errors import TrimsError
from trimsfs.fetch.fetcher import Fetcher, max_requests
from trimsfs.fetch.speed import StoreSpeed
from trimsfs.fetch.workers import Spawner, WorkerPool
from trimsfs.filesystem.filesystem import Filesystem, Mount
from trimsfs.filesystem.trust import Trust
from trimsfs.fuse.session import forget_pages, invalidate
from trimsfs.gpu.copies import GpuCopies
from trimsfs.gpu.copy_ledger import CopyLedger
from trimsfs.gpu.interface import GpuInterface
from trimsfs.handover.connection_settings import ConnectionSettings
from trimsfs.handover.keeper_client import KeeperClient, Promotion
from trimsfs.handover.ledger import Ledger
from trimsfs.integrity.digest_prefetch import DigestPrefetch
from trimsfs.integrity.integrity import Integrity
from trimsfs.integrity.manifests import ReadManifest
from trimsfs.integrity.signature_policy import SignaturePolicy, signed_first
from trimsfs.models.derived_blobs import DerivedBlobs
from trimsfs.models.tensor_tables import TensorTables
from trimsfs.mountinfo import holding
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.cold_open import ColdOpener
from trimsfs.opening.opener import Opener
from trimsfs.opening.passthrough import Passthrough
from trimsfs.opening.reopens import Reopens
from trimsfs.options import MountOptions
from trimsfs.prefetch.siblings import Siblings
from trimsfs.server.late_binding import LateBound
from trimsfs.stores import Retrying, RetryingStore, Store
from trimsfs.stores.digests import Digest
from trimsfs.tiers.blob import Blob
from trimsfs.tiers.deduplication import Deduplication
from trimsfs.tiers.disk.budget import DiskLimits
from trimsfs.tiers.disk.events import TierEvents
from trimsfs.tiers.disk.tier import DiskTier
from trimsfs.tiers.host.tier import HostTier
from trimsfs.tiers.policies import POLICIES
from trimsfs.tiers.quotas import Quotas
from trimsfs.types import Generation

Starting = Callable[..., Awaitable[Any]]
"""Runs for as long as the server does, and tells when it has begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """How many servers this mount has had before, and when this one was started, in seconds since the epoch."""

    restarts: int
    started: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """A server's components, as far as they are spoken to, and what runs as long as it does: what is there before the
    first request is answered, and what evicts, and so needs to know what is open."""

    disk: DiskTier
    namespace: Namespace
    passthrough: Passthrough
    filesystem: Filesystem
    lending: GpuInterface
    first: tuple[Starting, ...]
    later: tuple[Callable[[], Awaitable[None]], ...]


def assemble(
    options: MountOptions,
    mountpoint: Path,
    keeper: KeeperClient,
    promotion: Promotion,
    ledger: Ledger,
    settings: ConnectionSettings,
    spawner: Spawner,
    raw_store: Store,
    no_gpu: str | None,
    read_manifest: ReadManifest | None,
) -> Parts:
    """The components of the server of a mount; *no_gpu* tells why no GPU can be used, *read_manifest* reads what has
    been signed, where that matters."""
    assert options.cache_dir is not None
    started = time.time()
    speed = StoreSpeed(max_requests=max_requests(options.memory_limit))
    retrying = Retrying(deadline_s=options.retry_deadline, on_failure=speed.request_failed)
    store = RetryingStore(raw_store, retrying)
    pool = WorkerPool(spawner, count=options.fetch_processes or 2)
    removed = LateBound[[Blob], None]("removed")
    suspected = LateBound[[Blob, TrimsError], None]("suspected")
    approve = LateBound[[Blob], Awaitable[bool]]("approve")
    expected = LateBound[[Generation], Awaitable[Digest | None]]("expected")
    disk = DiskTier(
        options.cache_dir,
        store=raw_store.identity,
        limits=DiskLimits(
            budget=options.cache_size,
            min_free=options.min_free,
            quotas=Quotas({f"{tenant.path}/": tenant.cache_size for tenant in options.tenants}),
            policy=POLICIES[options.cache_policy],
        ),
        load_cost=speed.load_cost,
        compares=options.digests != "off",
        events=TierEvents(removed=removed, suspected=suspected),
        lock=promotion.lock,
    )
    host = HostTier(
        pool.populate,
        budget=options.host_size,
        policy=POLICIES[options.host_policy],
        quotas=Quotas({f"{tenant.path}/": tenant.host_size for tenant in options.tenants}),
    )
    compared = options.digests == "wait"
    passthrough = Passthrough(disk, host, ledger, approve=approve, compared=compared)
    removed.bind(passthrough.unregister)
    fetcher = Fetcher(
        pool,
        disk,
        retrying,
        speed,
        memory_limit=options.memory_limit,
        streaming=raw_store.streaming,
        completed=passthrough.register,
    )
    namespace = Namespace(store, ttl_s=options.metadata_ttl, impatient=raw_store, ledger=ledger)
    derived = DerivedBlobs(disk, passthrough, allowed=options.derived)
    tables = TensorTables(disk, fetcher)
    gpu = GpuCopies(
        disk,
        fetcher,
        tables,
        CopyLedger(ledger, keeper),
        options,
        unavailable=no_gpu,
        in_memory=lies_on(disk.directory, "tmpfs"),
    )
    lending = GpuInterface(gpu)

    async def repaired(generation: Generation) -> None:
        number = namespace.inodes.cached_number(generation)
        if number is not None:
            await trio.to_thread.run_sync(forget_pages, number, abandon_on_cancel=True)
        await gpu.compare(generation)

    digest_prefetch = DigestPrefetch(raw_store, store)
    integrity = Integrity(
        disk,
        fetcher,
        pool,
        retrying,
        passthrough,
        options,
        ask_digest=digest_prefetch.digest if read_manifest is None else signed_first(expected, digest_prefetch.digest),
        repaired=repaired,
    )
    approve.bind(integrity.approve)
    suspected.bind(integrity.quarantine.suspect)
    sharing = Deduplication(disk)
    sources: dict[str, metrics.Source] = {
        "disk": disk.statistics,
        "fetch": fetcher.statistics,
        "host": host.statistics,
        "integrity": integrity.statistics,
        "names": namespace.statistics,
        "server": lambda: ServerStatistics(restarts=promotion.restarts, started=started),
        "sharing": sharing.statistics,
        "store": retrying.statistics,
    }

    def facts() -> dict[str, object]:
        return {
            "version": __version__,
            "mountpoint": str(mountpoint),
            "store": options.store,
            "server_pid": os.getpid(),
            "keeper_pid": keeper.pid,
            "started": started,
            "restarts": promotion.restarts,
            "cache_dir": str(options.cache_dir),
            "cache_problem": disk.unusable,
            "log_file": str(options.log_file),
            "passthrough": passthrough.facts(),
            "gpu": lending.facts(),
            "options": options.model_dump(mode="json", exclude_none=True),
        }

    sources["gpu"] = gpu.statistics
    cold_opener = ColdOpener(
        fetcher,
        passthrough,
        mode="wait" if compared else options.cold_open,
        compared=compared,
        # What has been signed counts for more than what the store tells.
        fetching=digest_prefetch.expect if read_manifest is None else _ask_nothing,
    )
    reopens = Reopens(ledger, disk.release)
    signature_policy = None
    if read_manifest is not None:
        signature_policy = SignaturePolicy(
            namespace,
            disk,
            fetcher,
            read_manifest,
            required=options.signatures == "require",
            fetch=cold_opener.fetch,
            compare=integrity.comparer.compare,
            compare_later=integrity.compare_later,
        )
        expected.bind(signature_policy.expected)
        sources["signatures"] = signature_policy.statistics
    commands = Commands(namespace, disk, host, fetcher, passthrough, derived, gpu, integrity, signature_policy)
    control = Control(
        disk,
        passthrough,
        tables,
        sharing,
        commands,
        lending,
        options,
        metrics=metrics.renderer(sources),
        facts=facts,
    )
    siblings = Siblings(namespace, disk, fetcher, passthrough)
    filesystem = Filesystem(
        namespace,
        disk,
        control,
        derived,
        siblings,
        Opener(fetcher, passthrough, cold_opener, reopens),
        Trust(disk, fetcher, passthrough, compared=compared, signature_policy=signature_policy),
        Mount(ledger=ledger, mounted_ns=settings.mounted_ns, invalidate=invalidate),
    )
    sources["files"] = filesystem.statistics
    later: list[Callable[[], Awaitable[None]]] = [disk.run, host.run, commands.run, integrity.run]
    if options.share_chunks:
        later.append(sharing.run)
    return Parts(
        disk=disk,
        namespace=namespace,
        passthrough=passthrough,
        filesystem=filesystem,
        lending=lending,
        first=(
            pool.run,
            passthrough.run,
            fetcher.run,
            digest_prefetch.run,
            reopens.run,
            siblings.run,
            derived.run,
            gpu.run,
        ),
        later=tuple(later),
    )


def _ask_nothing(_blob: Blob) -> None:
    """No digest is asked for early."""


def lies_on(directory: Path, kind: str) -> bool:
    """Whether a directory lies on a kind of file system."""
    mount = holding(directory.resolve())
    return mount is not None and mount.kind == kind
