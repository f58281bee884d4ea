"""A server's life: it begins a mount or goes on with one, answers, and ends with it."""

import logging
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path

import trio

from trimsfs.errors import (
    FuseUnavailableError,
    StoreUnavailableError,
)
from trimsfs.fetch.workers import Spawner
from trimsfs.filesystem.filesystem import Filesystem
from trimsfs.fuse.session import Session, forget_attributes, why_no_passthrough
from trimsfs.gpu.interface import GpuInterface
from trimsfs.handover.connection_settings import ConnectionSettings
from trimsfs.handover.keeper_client import KeeperClient, Promotion
from trimsfs.handover.ledger import Ledger, RecordKind
from trimsfs.integrity.manifests import ReadManifest
from trimsfs.opening.passthrough import Passthrough
from trimsfs.options import MountOptions
from trimsfs.server.assembly import Parts, assemble, lies_on
from trimsfs.stores import Retrying, RetryingStore, Store
from trimsfs.tiers.disk.tier import DiskTier

log = logging.getLogger(__name__)

SETTLED_AFTER_S = 10.0
PROBE_DEADLINE_S = 5.0
"""How long a mount tries to reach its store before it gives up."""


async def serve(
    options: MountOptions,
    mountpoint: Path,
    keeper_end: socket.socket,
    promotion: Promotion,
    spawner: Spawner,
    raw_store: Store,
    no_gpu: str | None,
    read_manifest: ReadManifest | None,
) -> None:
    """Run the server until the file system is unmounted. *options* are resolved; *no_gpu* tells why no GPU
    can be used, *read_manifest* reads what has been signed, where that matters. Raises TrimsError."""
    ledger = Ledger(promotion.ledger)
    settings = ConnectionSettings.read(ledger) or ConnectionSettings(
        passthrough=options.passthrough, overlay=_lies_on_overlay(options), mounted_ns=time.time_ns()
    )
    keeper = KeeperClient(keeper_end)
    parts = assemble(
        options, mountpoint, keeper, promotion, ledger, settings, spawner, raw_store, no_gpu, read_manifest
    )
    try:
        if promotion.fuse is None:
            await _probe(raw_store, options)
        await _serve(options, mountpoint, keeper, promotion, parts, ledger, settings, no_gpu)
    finally:
        with trio.CancelScope(shield=True):
            await parts.disk.aclose()
        await raw_store.aclose()


def _lies_on_overlay(options: MountOptions) -> bool:
    assert options.cache_dir is not None
    return lies_on(options.cache_dir, "overlay")


async def _serve(
    options: MountOptions,
    mountpoint: Path,
    keeper: KeeperClient,
    promotion: Promotion,
    parts: Parts,
    ledger: Ledger,
    settings: ConnectionSettings,
    no_gpu: str | None,
) -> None:
    disk = parts.disk
    session = Session(parts.filesystem, settings)
    with session.on(await keeper.mount(disk.lock_descriptor) if promotion.fuse is None else promotion.fuse):
        async with trio.open_nursery() as nursery:
            for start in parts.first:
                await nursery.start(start)
            nursery.start_soon(keeper.run)
            nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
            if no_gpu is None:
                await nursery.start(_hand_out, keeper, parts.lending)
            if promotion.fuse is None:
                nursery.start_soon(_begin, session, keeper, parts.passthrough, disk, settings, ledger)
            else:
                await _go_on(session, keeper, parts.passthrough, parts.filesystem, settings, promotion)
                nursery.start_soon(_settle, parts.filesystem)
            if _ownership_has_changed(options, ledger):
                numbers = [inode.number for inode in parts.namespace.inodes]
                nursery.start_soon(trio.to_thread.run_sync, forget_attributes, numbers)
            ledger.forget_inherited()
            for run in parts.later:
                nursery.start_soon(run)
            log.info("serving %s at %s", options.store, mountpoint)
            await session.serve()
            log.info("%s is unmounted", mountpoint)
            nursery.cancel_scope.cancel()


async def _hand_out(
    keeper: KeeperClient, lending: GpuInterface, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Let clients of GPU copies connect, if that is possible; what tells them where begins after that."""
    listener = await keeper.listen()
    if listener is None:
        task_status.started()
    else:
        await lending.descriptors.run(*listener, task_status=task_status)


async def _begin(
    session: Session,
    keeper: KeeperClient,
    passthrough: Passthrough,
    disk: DiskTier,
    settings: ConnectionSettings,
    ledger: Ledger,
) -> None:
    """Once the kernel has agreed on the connection, find out how files can be served, and tell the keeper."""
    connection = await session.agreed()
    refusal = None
    if not settings.passthrough:
        refusal = "switched off by --no-passthrough"
    elif not connection.passthrough:
        refusal = why_no_passthrough()
    else:
        try:
            keeper.close(await keeper.open(disk.lock_descriptor))
        except FuseUnavailableError as error:
            refusal = str(error)
    replace(settings, init=connection.init.hex(), refusal=refusal).record(ledger)
    if refusal is None:
        passthrough.enable(keeper)
    else:
        passthrough.disable(refusal)
    await keeper.ready(resends=connection.resends)


async def _go_on(
    session: Session,
    keeper: KeeperClient,
    passthrough: Passthrough,
    filesystem: Filesystem,
    settings: ConnectionSettings,
    promotion: Promotion,
) -> None:
    """Take up what the server before has left, before the first request is answered."""
    if settings.refusal is None:
        passthrough.enable(keeper)
        await passthrough.restore(promotion.unclaimed)
    else:
        passthrough.disable(settings.refusal)
    await filesystem.takeover.restore()
    session.resume()
    await keeper.ready(resends=True)


async def _settle(filesystem: Filesystem) -> None:
    """What was left unanswered comes again at once; whatever has not come by then was answered."""
    await trio.sleep(SETTLED_AFTER_S)
    filesystem.takeover.all_resent()


def _ownership_has_changed(options: MountOptions, ledger: Ledger) -> bool:
    """Whether files have other owners or modes than an earlier server has told the kernel."""
    names = {"uid", "gid", "mode", "dir_mode", "access"}
    content = options.model_dump_json(include=names).encode()
    before = ledger.inherited(RecordKind.OWNERSHIP)
    if [entry.content for entry in before] == [content]:
        return False
    for entry in before:
        ledger.set_count(entry.slot, 0)
    ledger.add(RecordKind.OWNERSHIP, 0, content)
    return bool(before)


async def _probe(store: Store, options: MountOptions) -> None:
    try:
        await RetryingStore(store, Retrying(deadline_s=PROBE_DEADLINE_S, on_failure=None)).probe()
    except StoreUnavailableError as error:
        remedy = "check the network" + (" and --endpoint-url" if options.endpoint_url else "")
        raise StoreUnavailableError(f"{options.store}: {error}: {remedy}") from error


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            log.info("stopping")
            scope.cancel()
