"""The server: puts the components together and runs them in one nursery.

Started by the keeper as ``python -m trimsfs.daemon --keeper-fd N`` with the mount's options as JSON on standard input.
"""

import argparse
import contextlib
import encodings.idna  # noqa: F401 - wanted by the first request, when Python may be out of reach
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import trio

from trimsfs import __version__, metrics
from trimsfs.coldopen import ColdOpener
from trimsfs.confinement import (
    HIGHEST_NICE,
    RLIMIT_NICE,
    become,
    fence,
    give,
    hindrance,
    identity,
    raised,
)
from trimsfs.control import Control
from trimsfs.derived import DerivedBlobs
from trimsfs.errors import (
    CacheUnusableError,
    FuseUnavailableError,
    StoreUnavailableError,
    TrimsError,
)
from trimsfs.eviction import POLICIES
from trimsfs.exits import exit_code
from trimsfs.fetch import Fetcher, max_requests
from trimsfs.filesystem import Filesystem
from trimsfs.formats import load_readers
from trimsfs.fuse.session import Session, forget_attributes, invalidate, why_no_passthrough
from trimsfs.keeper import Keeper, Turn, stand_by, tell_failure
from trimsfs.ledger import Kind, Ledger
from trimsfs.mountinfo import holding
from trimsfs.namespace import Namespace
from trimsfs.options import MountOptions
from trimsfs.residents import Residents
from trimsfs.siblings import Siblings
from trimsfs.stores import Retrying, RetryingStore, Store, open_store
from trimsfs.tables import TensorTables
from trimsfs.terms import Terms, recorded
from trimsfs.tiers.disk import DiskTier
from trimsfs.tiers.host import HostTier
from trimsfs.tiers.quotas import Quotas
from trimsfs.tiers.sharing import Sharing
from trimsfs.transfer import Copier
from trimsfs.workers import Spawner, WorkerPool

log = logging.getLogger(__name__)

SERVER_NICENESS, STANDBY_NICENESS = -10, 10
SWITCH_INTERVAL_S = 0.0005
"""How long the event loop waits, at most, for a thread that runs Python; by default ten times as long."""
SETTLED_AFTER_S = 10.0
PROBE_DEADLINE_S = 5.0
"""How long a mount tries to reach its store before it gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatistics:
    """How many servers this mount has had before, and when this one was started, in seconds since the epoch."""

    restarts: int
    started: float


async def serve(
    options: MountOptions,
    mountpoint: Path,
    keeper_end: socket.socket,
    turn: Turn,
    spawner: Spawner,
    raw_store: Store,
) -> None:
    """Run the server until the file system is unmounted. *options* are resolved. Raises TrimsError."""
    assert options.cache_dir is not None
    disk = DiskTier(
        options.cache_dir,
        store=raw_store.identity,
        budget=options.cache_size,
        min_free=options.min_free,
        policy=POLICIES[options.cache_policy],
        quotas=Quotas({f"{tenant.path}/": tenant.cache_size for tenant in options.tenants}),
        lock=turn.lock,
    )
    try:
        if turn.fuse is None:
            await _probe(raw_store, options)
        await _serve(options, mountpoint, Keeper(keeper_end), turn, spawner, raw_store, disk)
    finally:
        with trio.CancelScope(shield=True):
            await disk.aclose()
        await raw_store.aclose()


async def _serve(
    options: MountOptions,
    mountpoint: Path,
    keeper: Keeper,
    turn: Turn,
    spawner: Spawner,
    raw_store: Store,
    disk: DiskTier,
) -> None:
    started, ledger = time.time(), Ledger(turn.ledger)
    terms = recorded(ledger) or Terms(
        passthrough=options.passthrough, overlay=_on_overlay(options), mounted_ns=time.time_ns()
    )
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
    residents = Residents(disk, host, ledger=ledger)
    disk.on_removed = residents.withdraw
    disk.load_cost = fetcher.load_cost
    fetcher.completed = residents.announce
    sharing = Sharing(disk)
    namespace = Namespace(
        RetryingStore(raw_store, retrying), ttl_s=options.metadata_ttl, impatient=raw_store, ledger=ledger
    )
    sources: dict[str, metrics.Source] = {
        "disk": disk.statistics,
        "fetch": fetcher.statistics,
        "host": host.statistics,
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
            "log_file": str(options.log_file),
            "passthrough": residents.facts(),
            "options": options.model_dump(mode="json", exclude_none=True),
        }

    derived = DerivedBlobs(disk, residents, allowed=options.derived)
    control = Control(
        namespace,
        disk,
        host,
        fetcher,
        residents,
        TensorTables(disk, fetcher),
        derived,
        sharing,
        options,
        metrics=metrics.renderer(sources),
        facts=facts,
    )
    cold_opener = ColdOpener(disk, fetcher, residents, mode=options.cold_open)
    siblings = Siblings(namespace, disk, fetcher, residents)
    filesystem = Filesystem(
        namespace,
        disk,
        fetcher,
        control,
        residents,
        cold_opener,
        siblings,
        derived,
        mounted_ns=terms.mounted_ns,
        ledger=ledger,
        invalidate=invalidate,
    )
    sources["files"] = filesystem.statistics
    session = Session(filesystem, terms)
    with session.on(await keeper.mount(disk.lock_descriptor) if turn.fuse is None else turn.fuse):
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            await nursery.start(residents.run)
            await nursery.start(fetcher.run)
            await nursery.start(cold_opener.run)
            await nursery.start(siblings.run)
            await nursery.start(derived.run)
            nursery.start_soon(keeper.run)
            nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
            if turn.fuse is None:
                nursery.start_soon(_begin, session, keeper, residents, disk, terms, ledger)
            else:
                await _go_on(session, keeper, residents, filesystem, terms, turn)
                nursery.start_soon(_settle, filesystem)
            if _ownership_has_changed(options, ledger):
                numbers = namespace.numbers()
                nursery.start_soon(trio.to_thread.run_sync, forget_attributes, numbers)
            ledger.forget_taken()
            # These evict, which needs to know what is open.
            nursery.start_soon(disk.run)
            nursery.start_soon(host.run)
            if options.share_chunks:
                nursery.start_soon(sharing.run)
            await nursery.start(control.run)
            log.info("serving %s at %s", options.store, mountpoint)
            await session.serve()
            log.info("%s is unmounted", mountpoint)
            nursery.cancel_scope.cancel()


def _on_overlay(options: MountOptions) -> bool:
    assert options.cache_dir is not None
    mount = holding(options.cache_dir.resolve())
    return mount is not None and mount.kind == "overlay"


async def _begin(
    session: Session, keeper: Keeper, residents: Residents, disk: DiskTier, terms: Terms, ledger: Ledger
) -> None:
    """Once the kernel has agreed on the connection, find out how files can be served, and tell the keeper."""
    connection = await session.agreed()
    refusal = None
    if not terms.passthrough:
        refusal = "switched off by --no-passthrough"
    elif not connection.passthrough:
        refusal = why_no_passthrough()
    else:
        try:
            keeper.close(await keeper.open(disk.lock_descriptor))
        except FuseUnavailableError as error:
            refusal = str(error)
    replace(terms, init=connection.init.hex(), refusal=refusal).record(ledger)
    if refusal is None:
        residents.backed_by(keeper)
    else:
        residents.impossible(refusal)
    await keeper.ready(resends=connection.resends)


async def _go_on(
    session: Session, keeper: Keeper, residents: Residents, filesystem: Filesystem, terms: Terms, turn: Turn
) -> None:
    """Take up what the server before has left, before the first request is answered."""
    if terms.refusal is None:
        residents.backed_by(keeper)
        await residents.restore(turn.unclaimed)
    else:
        residents.impossible(terms.refusal)
    await filesystem.restore()
    session.resume()
    await keeper.ready(resends=True)


async def _settle(filesystem: Filesystem) -> None:
    """What was left unanswered comes again at once; whatever has not come by then was answered."""
    await trio.sleep(SETTLED_AFTER_S)
    filesystem.all_asked_again()


def _ownership_has_changed(options: MountOptions, ledger: Ledger) -> bool:
    """Whether files have other owners or modes than an earlier server has told the kernel."""
    names = {"uid", "gid", "mode", "dir_mode", "access"}
    content = options.model_dump_json(include=names).encode()
    before = ledger.taken(Kind.OWNERSHIP)
    if [entry.content for entry in before] == [content]:
        return False
    for entry in before:
        ledger.set(entry.slot, 0)
    ledger.add(Kind.OWNERSHIP, 0, content)
    return bool(before)


async def _probe(store: Store, options: MountOptions) -> None:
    try:
        await RetryingStore(store, Retrying(deadline_s=PROBE_DEADLINE_S)).probe()
    except StoreUnavailableError as error:
        remedy = "check the network" + (" and --endpoint-url" if options.endpoint_url else "")
        raise StoreUnavailableError(f"{options.store}: {error}: {remedy}") from error


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            log.info("stopping")
            scope.cancel()


def _configure_logging(options: MountOptions) -> None:
    """Log to what the keeper logs to: a file that is its to open, and to keep short, or a terminal."""
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("boto3", "botocore", "urllib3"):
        # They log headers, signatures among them, at debug.
        logging.getLogger(name).setLevel(logging.WARNING)


def main() -> None:
    """Entry point of the server process; exits 0 when the file system was unmounted, else with a documented code."""
    parser = argparse.ArgumentParser(prog="trimsfs.daemon")
    parser.add_argument("--keeper-fd", type=int, required=True)
    arguments = parser.parse_args()
    keeper_end = socket.socket(fileno=arguments.keeper_fd)
    os.umask(0o077)
    failure: TrimsError | None = None
    try:
        order = json.load(sys.stdin)
        options = MountOptions.model_validate(order["options"])
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        store = open_store(options, max_requests=max_requests(options.memory_limit))
        load_readers()
        _confine(options)
        # What has been imported stays: looking through it for garbage would hold the event loop up for tens of ms.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        turn = stand_by(keeper_end)
        if turn is not None:
            held = [keeper_end.fileno(), turn.ledger, *filter(None, (turn.lock, turn.fuse))]
            spawner = Spawner(partial(_make_copier, options, store), not_for_it=held)
            _step_forward()
            trio.run(serve, options, Path(order["mountpoint"]), keeper_end, turn, spawner, store)
    except* TrimsError as group:
        failure = _first(group)
    if failure is not None:
        log.error("%s", failure)
        tell_failure(keeper_end, failure)
        sys.exit(exit_code(type(failure).__name__))


def _confine(options: MountOptions) -> None:
    """Give up what is not needed once everything is loaded, and begin to log."""
    assert options.cache_dir is not None
    if options.server_user is not None:
        if raised(RLIMIT_NICE, HIGHEST_NICE):
            os.setpriority(os.PRIO_PROCESS, 0, STANDBY_NICENESS)  # until it is this process's turn
        else:
            _step_forward()  # there is no other chance
        user = identity(options.server_user)
        give(options.cache_dir, user)
        become(user)
    hindered = hindrance(options.cache_dir)
    if hindered is not None:
        raise CacheUnusableError(f"cache directory {options.cache_dir}: {hindered}: set --cache-dir or --server-user")
    _configure_logging(options)
    if options.fence:
        os.environ["SQLITE_TMPDIR"] = str(options.cache_dir)
        fence([options.cache_dir])


def _step_forward() -> None:
    """Have a core at once, as far as that is allowed: every open of every program waits for this process."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, SERVER_NICENESS)
        if os.getsid(0) == os.getppid():  # the keeper's own session, not a user's
            Path("/proc/self/autogroup").write_text(str(SERVER_NICENESS))


def _make_copier(options: MountOptions, store: Store) -> Copier:
    """What a fetch process works with: the server's own store, where it can be shared."""
    requests = max_requests(options.memory_limit)
    return Copier(store if store.forkable else open_store(options, max_requests=requests), threads=requests)


def _first(group: BaseExceptionGroup[TrimsError]) -> TrimsError:
    """The first error in a group."""
    error: TrimsError | BaseExceptionGroup[TrimsError] = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
