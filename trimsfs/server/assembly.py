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
from trimsfs.fetch.fetcher import Fetcher
from trimsfs.fetch.workers import Spawner, WorkerPool
from trimsfs.filesystem.filesystem import Filesystem
from trimsfs.fuse.session import forget_pages, invalidate
from trimsfs.gpu.copies import GpuCopies
from trimsfs.gpu.copy_ledger import CopyLedger
from trimsfs.gpu.interface import GpuInterface
from trimsfs.handover.connection import Terms
from trimsfs.handover.keeper_client import Keeper, Turn
from trimsfs.handover.ledger import Ledger
from trimsfs.integrity.compare import Integrity
from trimsfs.integrity.digest_prefetch import DigestPrefetch
from trimsfs.integrity.signature_policy import ReadManifest, SignaturePolicy
from trimsfs.models.derived_blobs import DerivedBlobs
from trimsfs.models.tensor_tables import TensorTables
from trimsfs.mountinfo import holding
from trimsfs.namespace.tree import Namespace
from trimsfs.opening.cold_open import ColdOpener
from trimsfs.opening.passthrough import Passthrough
from trimsfs.options import MountOptions
from trimsfs.prefetch.siblings import Siblings
from trimsfs.stores import Retrying, RetryingStore, Store
from trimsfs.tiers.deduplication import Deduplication
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

    namespace: Namespace
    passthrough: Passthrough
    filesystem: Filesystem
    lending: GpuInterface
    first: tuple[Starting, ...]
    later: tuple[Callable[[], Awaitable[None]], ...]


def assemble(
    options: MountOptions,
    mountpoint: Path,
    keeper: Keeper,
    turn: Turn,
    ledger: Ledger,
    terms: Terms,
    spawner: Spawner,
    raw_store: Store,
    disk: DiskTier,
    no_gpu: str | None,
    read_manifest: ReadManifest | None,
) -> Parts:
    """The components of the server of a mount; *no_gpu* tells why no GPU can be used, *read_manifest* reads what has
    been signed, where that matters."""
    started = time.time()
    retrying = Retrying(deadline_s=options.retry_deadline)
    pool = WorkerPool(spawner, count=options.fetch_processes or 2)
    fetcher = Fetcher(
        pool,
        disk,
        retrying,
        memory_limit=options.memory_limit,
        retry_deadline_s=options.retry_deadline,
        streaming=raw_store.streaming,
    )
    retrying.on_failure = fetcher.store_failed
    host = HostTier(
        pool.populate,
        budget=options.host_size,
        policy=POLICIES[options.host_policy],
        quotas=Quotas({f"{tenant.path}/": tenant.host_size for tenant in options.tenants}),
    )
    compared = options.digests == "wait"
    passthrough = Passthrough(disk, host, ledger=ledger, compared=compared)
    disk.on_removed = passthrough.unregister
    disk.evictor.load_cost = fetcher.load_cost
    fetcher.completed = passthrough.register
    store = RetryingStore(raw_store, retrying)
    digest_prefetch = DigestPrefetch(raw_store, store)
    integrity = Integrity(
        disk,
        fetcher,
        pool,
        retrying,
        digest_prefetch.digest,
        mode=options.digests,
        scrub_interval_s=options.scrub_interval,
        scrub_rate=options.scrub_rate,
    )
    integrity.repair.withdraw = passthrough.unregister
    passthrough.approve = integrity.approve
    sharing = Deduplication(disk)
    namespace = Namespace(store, ttl_s=options.metadata_ttl, impatient=raw_store, ledger=ledger)
    sources: dict[str, metrics.Source] = {
        "disk": disk.statistics,
        "fetch": fetcher.statistics,
        "host": host.statistics,
        "integrity": integrity.statistics,
        "names": namespace.statistics,
        "server": lambda: ServerStatistics(restarts=turn.restarts, started=started),
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
            "restarts": turn.restarts,
            "cache_dir": str(options.cache_dir),
            "cache_problem": disk.unusable,
            "log_file": str(options.log_file),
            "passthrough": passthrough.facts(),
            "gpu": lending.facts(),
            "options": options.model_dump(mode="json", exclude_none=True),
        }

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

    async def repaired(generation: Generation) -> None:
        number = namespace.cached_number(generation)
        if number is not None:
            await trio.to_thread.run_sync(forget_pages, number, abandon_on_cancel=True)
        await gpu.compare(generation)

    integrity.repair.on_repaired = repaired
    integrity.quarantine.on_change = passthrough.health_changed
    lending = GpuInterface(gpu)
    sources["gpu"] = gpu.statistics
    cold_opener = ColdOpener(
        disk, fetcher, passthrough, mode="wait" if compared else options.cold_open, compared=compared
    )
    signature_policy = None
    if read_manifest is None:
        cold_opener.fetching = digest_prefetch.expect
    else:  # what has been signed counts, and is told by others
        signature_policy = SignaturePolicy(
            namespace,
            disk,
            fetcher,
            read_manifest,
            required=options.signatures == "require",
            fetch=cold_opener.fetch,
            compare=integrity.compare,
        )
        integrity.signed = signature_policy.expected
        signature_policy.compare_later = integrity.compare_later
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
        fetcher,
        control,
        passthrough,
        cold_opener,
        siblings,
        derived,
        mounted_ns=terms.mounted_ns,
        signature_policy=signature_policy,
        ledger=ledger,
        invalidate=invalidate,
    )
    sources["files"] = filesystem.statistics
    later: list[Callable[[], Awaitable[None]]] = [disk.run, host.run, commands.run, integrity.run]
    if options.share_chunks:
        later.append(sharing.run)
    return Parts(
        namespace=namespace,
        passthrough=passthrough,
        filesystem=filesystem,
        lending=lending,
        first=(
            pool.run,
            passthrough.run,
            fetcher.run,
            digest_prefetch.run,
            cold_opener.run,
            siblings.run,
            derived.run,
            gpu.run,
        ),
        later=tuple(later),
    )


def lies_on(directory: Path, kind: str) -> bool:
    """Whether a directory lies on a kind of file system."""
    mount = holding(directory.resolve())
    return mount is not None and mount.kind == kind
