"""Lifecycle: a server begins a mount or takes one over, answers requests, and ends with the mount."""

import logging
import math
import os
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import trio

from trimsfs.concurrency.in_thread import in_thread
from trimsfs.errors import (
    BucketNotFoundError,
    FuseUnavailableError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
)
from trimsfs.fetch.processes.worker_pool import WorkerPool
from trimsfs.fetch.processes.workers import Spawner
from trimsfs.filesystem.handles import Handles
from trimsfs.fuse.kernel_features import lacking
from trimsfs.fuse.session import Session, forget_attributes, forget_pages, invalidate, why_no_passthrough
from trimsfs.handover.connection_settings import ConnectionSettings
from trimsfs.handover.keeper_client import KeeperClient, Promotion
from trimsfs.handover.ledger import Ledger, Record, RecordKind
from trimsfs.integrity.manifests import ReadManifest
from trimsfs.mountinfo import lies_on
from trimsfs.namespace.inodes import Inode
from trimsfs.namespace.tree import Namespace
from trimsfs.options import MountOptions, Place, places
from trimsfs.server.assembly import assemble
from trimsfs.server.components import Components
from trimsfs.server.environment import Environment, recovery_of
from trimsfs.server.plugin import ServerPlugin
from trimsfs.stores.base import Store
from trimsfs.stores.broker import Broker
from trimsfs.stores.local_directory import DirectoryStore
from trimsfs.stores.open import beneath
from trimsfs.stores.reach import reach_place, unreachable
from trimsfs.stores.router import stores_of

log = logging.getLogger(__name__)

SETTLED_AFTER_S = 10.0
"""Time in which the kernel resends, at once, all requests that the previous server did not answer."""
PROBE_DEADLINE_S = 5.0
"""How long a new mount tries to reach its store, before it fails."""
KNOWN_PROBE_DEADLINE_S, KNOWN_RETRIES_S = 1.0, 0.3
"""If it knows names, how long it waits for an answer, and for how long it repeats what fails, before it serves what is
cached: programs that start at boot wait for it."""


async def serve(
    options: MountOptions,
    mountpoint: Path,
    keeper_end: socket.socket,
    promotion: Promotion,
    *,
    store: Store,
    spawner: Spawner,
    plugins: Sequence[ServerPlugin],
    read_manifest: ReadManifest | None,
    launched: bool,
) -> None:
    """Run the server until the file system is unmounted. Raises TrimsError.

    *options* are resolved. This process loaded the rest before it dropped privileges; it is as in `Environment`.
    """
    assert options.cache_dir is not None
    try:
        ledger = Ledger(promotion.ledger)
        settings = ConnectionSettings.read(ledger) or ConnectionSettings(
            passthrough=options.passthrough, overlay=lies_on(options.cache_dir, "overlay"), mounted_ns=time.time_ns()
        )
        keeper = KeeperClient(
            keeper_end,
            recovery=recovery_of(mountpoint, launched=launched),
            pid=promotion.keeper_pid,
            backing_limit=promotion.backing_limit,
        )
        pool = WorkerPool(spawner, count=options.fetch_processes or 2)
        # The kernel numbers threads as in the keeper's PID namespace.
        session = Session(settings, hide_threads=not keeper.in_sight)
        environment = Environment(
            mountpoint=mountpoint,
            mounted_ns=settings.mounted_ns,
            started=time.time(),
            restarts=promotion.restarts,
            server_pid=promotion.server_pid,
            keeper_pid=keeper.pid,
            kept=keeper.connected,
            keeper_problem=keeper.problem,
            launched=launched,
            keeper=keeper,
            ledger=ledger,
            lock=promotion.lock,
            store=store,
            copier=pool,
            read_manifest=read_manifest,
            invalidate=invalidate,
            forget_pages=forget_pages,
            expire=session.expire,
            prune=session.prune,
            drop_pages=session.drop_pages,
            waits=session.waits,
        )
        components = assemble(options, environment, plugins)
        try:
            if promotion.fuse is None:
                await _reach_stores(store, options, components)
            await _serve(options, environment, components, session, keeper, promotion, settings, pool)
        finally:
            with trio.CancelScope(shield=True):
                await components.disk.aclose()
    finally:
        await store.aclose()


async def _serve(
    options: MountOptions,
    environment: Environment,
    components: Components,
    session: Session,
    keeper: KeeperClient,
    promotion: Promotion,
    settings: ConnectionSettings,
    pool: WorkerPool,
) -> None:
    fuse = promotion.fuse
    if fuse is None:
        fuse = await keeper.mount(components.disk.lock_descriptor)
    with session.on(fuse, components.filesystem):
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            await components.start(nursery)
            nursery.start_soon(keeper.run)
            for _, store in stores_of(environment.store):
                directory = beneath(store)
                if isinstance(directory, DirectoryStore) and isinstance(directory.broker, Broker):
                    nursery.start_soon(directory.broker.process.watch)
            nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
            if promotion.fuse is None:
                nursery.start_soon(_begin, options, session, keeper, components, settings, environment.ledger)
            else:
                await _take_over(options, session, keeper, components, settings, promotion.unclaimed)
                nursery.start_soon(_settle, components.filesystem.handles)
            before = environment.ledger.inherited(RecordKind.OWNERSHIP)
            nursery.start_soon(_renew_ownership, options, environment.ledger, before, components.namespace.inodes)
            environment.ledger.forget_inherited()
            await components.start_maintenance(nursery)
            if promotion.fuse is not None:
                environment.takeover_seconds.observe(time.monotonic() - promotion.vacant_since)
            log.info("serving %s at %s", options.store, environment.mountpoint)
            await session.serve()
            log.info("%s is unmounted", environment.mountpoint)
            nursery.cancel_scope.cancel()


async def _begin(
    options: MountOptions,
    session: Session,
    keeper: KeeperClient,
    components: Components,
    settings: ConnectionSettings,
    ledger: Ledger,
) -> None:
    """Begin a mount: wait for the kernel's settings, decide on passthrough, and tell the keeper that it serves."""
    connection, init = await session.agreed()
    refusal = None
    if not settings.passthrough:
        refusal = "switched off by passthrough = false"
    elif not connection["passthrough"]:
        refusal = why_no_passthrough()
    else:
        try:
            keeper.close(await keeper.open(components.disk.lock_descriptor))
        except FuseUnavailableError as error:
            refusal = str(error)
    settings = replace(settings, init=init.hex(), refusal=refusal, direct=connection["direct"])
    settings.record(ledger)
    components.decide_modes(keeper, settings)
    for lack in lacking(connection):
        log.info("this kernel, Linux %s, has %s", os.uname().release, lack)
    for path in [path for path, _ in components.breakers.items() if components.namespace.is_empty(path)]:
        components.namespace.expire(path)
        with suppress(StoreError):
            await components.namespace.entries(path)  # again, as it is recorded for the next server only now
    await keeper.ready(resends=connection["resends"])
    async with trio.open_nursery() as nursery:
        for place in (place for place in places(options) if place.tenant is None):  # others may lack a token as yet
            nursery.start_soon(_look_ahead, components.namespace, place.path)


async def _look_ahead(namespace: Namespace, path: str) -> None:
    """List the root of a store for the first program."""
    try:
        await namespace.look_ahead(path)
    except StoreError as error:
        log.debug("/%s: not listed ahead: %s", path, error)
    except Exception:  # a defect: it ends this request, not the server
        log.exception("/%s: not listed ahead: internal error", path)


async def _take_over(
    options: MountOptions,
    session: Session,
    keeper: KeeperClient,
    components: Components,
    settings: ConnectionSettings,
    unclaimed: Sequence[int],
) -> None:
    """Take a mount over: restore the previous server's state before the first request is answered.

    Nothing has shown yet whether the store takes the credentials of this server.
    """
    for breaker in components.breakers.values():
        breaker.doubt()
    components.decide_modes(keeper, settings)
    await components.take_over(unclaimed=unclaimed)
    session.resume()
    await keeper.ready(resends=True)
    for place in places(options):
        await components.namespace.recall_root(place.path)  # facts tell if there was nothing


async def _settle(handles: Handles) -> None:
    """Settle a takeover: the previous server has answered the opens that the kernel has not resent by now."""
    await trio.sleep(SETTLED_AFTER_S)
    handles.all_resent()


async def _renew_ownership(
    options: MountOptions, ledger: Ledger, before: Sequence[Record], inodes: Iterable[Inode]
) -> None:
    """Have the kernel forget attributes if an earlier server had other options for owners and modes.

    Only then are those of now recorded: if this server ends earlier, the next one does it.
    """
    names = {"uid", "gid", "mode", "dir_mode", "access"}
    content = options.model_dump_json(include=names).encode()
    if [entry.content for entry in before] == [content]:
        return
    if before:
        await in_thread(forget_attributes, [inode.number for inode in inodes])
    ledger.add(RecordKind.OWNERSHIP, 0, content)
    for entry in before:
        ledger.set_count(entry.slot, 0)


async def _reach_stores(store: Store, options: MountOptions, components: Components) -> None:
    """Probe the stores. Raises StoreError.

    If a store's names are known, or another store can serve, only warns when it does not answer.
    """
    stores, away = dict(stores_of(store)), dict[str, StoreUnavailableError]()

    async def reach_one(place: Place) -> None:
        try:
            error = await _why_away(stores[place.path], place, components)
        except (StoreAccessError, BucketNotFoundError) as refused:
            if place.tenant is None:
                raise type(refused)(f"{place.table}{refused}") from refused
            log.warning("tenant %s: the store refuses its credentials: %s", place.tenant.path, refused)
            return
        if error is not None:
            away[place.path] = error

    async with trio.open_nursery() as nursery:
        for place in places(options):
            nursery.start_soon(reach_one, place)
    unknown = [path for path in away if not await components.namespace.recall_root(path)]
    if len(unknown) == len(stores):
        raise away[unknown[0]]
    for path, error in away.items():
        log.warning("serving what is cached until the store answers: %s", error)
        components.breakers.of(path).give_up(StoreUnavailableError(str(error.__cause__)))
        components.breakers.of(path).doubt()  # a probe learns the reason where this one was too short


async def _why_away(store: Store, place: Place, components: Components) -> StoreUnavailableError | None:
    """Why a store does not answer, with the remedy; None if it does. Raises StoreError if it is missing or refuses."""
    options, known = place.options, await components.namespace.recall_root(place.path)
    retries_s = KNOWN_RETRIES_S if known else min(PROBE_DEADLINE_S, options.retry_deadline)
    failure = StoreUnavailableError(f"no answer within {KNOWN_PROBE_DEADLINE_S:.0f} s")
    try:
        with trio.move_on_after(KNOWN_PROBE_DEADLINE_S if known else math.inf):
            if not await reach_place(store, place, deadline_s=retries_s):
                await components.namespace.entries(place.path)  # facts tell that there is nothing
            return None
    except StoreUnavailableError as error:
        failure = error
    problem = StoreUnavailableError(f"{options.store}: {unreachable(failure, options)}")
    problem.__cause__ = failure
    return problem


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            log.info("received SIGTERM: stopping")
            scope.cancel()
