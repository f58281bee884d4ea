"""The server: puts the components together and runs them in one nursery.

Started by the keeper as ``python -m trimsfs.daemon --keeper-fd N`` with the mount's options as JSON on standard input.
"""

import argparse
import json
import logging
import logging.handlers
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import trio

from trimsfs import __version__, metrics
from trimsfs.control import Control
from trimsfs.errors import FuseUnavailableError, MountpointError, StoreUnavailableError, TrimsError
from trimsfs.exits import exit_code
from trimsfs.fetch import Fetcher, max_requests
from trimsfs.filesystem import Filesystem
from trimsfs.fuse import session
from trimsfs.namespace import Namespace
from trimsfs.options import MountOptions
from trimsfs.stores import RetryingStore, Store, open_store
from trimsfs.tiers.disk import DiskTier

log = logging.getLogger(__name__)

MESSAGE_LIMIT = 65536
PROBE_DEADLINE_S = 5.0
"""How long a mount tries to reach its store before it gives up."""


class Keeper:
    """The server's end of the channel to its keeper: one JSON object a message."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel

    def mount(self) -> int:
        """Have the file system mounted; the /dev/fuse descriptor. Raises FuseUnavailableError, MountpointError."""
        self._send({"type": "mount"})
        message, descriptors, _, _ = socket.recv_fds(self._channel, MESSAGE_LIMIT, 1)
        answer = json.loads(message or b"{}")
        if descriptors:
            return descriptors[0]
        kind = MountpointError if answer.get("kind") == "MountpointError" else FuseUnavailableError
        raise kind(answer.get("error", "the keeper is gone"))

    def ready(self) -> None:
        """Tell that the mount answers."""
        self._send({"type": "ready"})

    def failed(self, error: Exception) -> None:
        """Tell why there will be no mount."""
        self._send({"type": "failed", "kind": type(error).__name__, "error": str(error)})

    def _send(self, message: dict[str, object]) -> None:
        self._channel.send(json.dumps(message).encode())


async def serve(options: MountOptions, mountpoint: Path, keeper: Keeper) -> None:
    """Run the server until the file system is unmounted. *options* are resolved. Raises TrimsError."""
    assert options.cache_dir is not None
    started, keeper_pid = time.time(), os.getppid()
    requests = max_requests(options.memory_limit)
    raw_store = open_store(options, max_requests=requests)
    disk = DiskTier(
        options.cache_dir,
        store=raw_store.identity,
        budget=options.cache_size,
        min_free=options.min_free,
    )
    try:
        await _probe(raw_store, options)
        store = RetryingStore(raw_store, deadline_s=options.retry_deadline)
        fetcher = Fetcher(store, disk, memory_limit=options.memory_limit, retry_deadline_s=options.retry_deadline)
        store.on_failure = fetcher.store_failed
        namespace = Namespace(store, ttl_s=options.metadata_ttl, impatient=raw_store)
        sources: dict[str, metrics.Source] = {
            "disk": disk.statistics,
            "fetch": fetcher.statistics,
            "names": namespace.statistics,
            "store": store.statistics,
        }

        def facts() -> dict[str, object]:
            return {
                "version": __version__,
                "mountpoint": str(mountpoint),
                "store": options.store,
                "server_pid": os.getpid(),
                "keeper_pid": keeper_pid,
                "started": started,
                "cache_dir": str(options.cache_dir),
                "log_file": str(options.log_file),
                "options": options.model_dump(mode="json", exclude_none=True),
            }

        control = Control(namespace, disk, fetcher, options, metrics=metrics.renderer(sources), facts=facts)
        filesystem = Filesystem(
            namespace,
            disk,
            fetcher,
            control,
            mounted_ns=time.time_ns(),
            invalidate=session.invalidate,
        )
        sources["files"] = filesystem.statistics
        with session.session(filesystem, options, keeper.mount()) as agreed:
            async with trio.open_nursery() as nursery:
                await nursery.start(fetcher.run)
                await nursery.start(control.run)
                nursery.start_soon(disk.run)
                nursery.start_soon(_stop_on_signal, nursery.cancel_scope)
                nursery.start_soon(_announce, agreed, keeper)
                log.info("serving %s at %s", options.store, mountpoint)
                await session.serve()
                log.info("%s is unmounted", mountpoint)
                nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await disk.aclose()
        await raw_store.aclose()


async def _announce(agreed: trio.Event, keeper: Keeper) -> None:
    await agreed.wait()
    keeper.ready()


async def _probe(store: Store, options: MountOptions) -> None:
    try:
        await RetryingStore(store, deadline_s=PROBE_DEADLINE_S).probe()
    except StoreUnavailableError as error:
        remedy = "check the network" + (" and --endpoint-url" if options.endpoint_url else "")
        raise StoreUnavailableError(f"{options.store}: {error}: {remedy}") from error


async def _stop_on_signal(scope: trio.CancelScope) -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            log.info("stopping")
            scope.cancel()


def _configure_logging(options: MountOptions, *, foreground: bool) -> None:
    handler: logging.Handler = logging.StreamHandler()
    if not foreground:
        assert options.log_file is not None
        options.log_file.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(options.log_file, maxBytes=16 << 20, backupCount=2)
    logging.basicConfig(
        level=options.log_level.upper(),
        handlers=[handler],
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    for name in ("boto3", "botocore", "urllib3"):
        # They log headers, signatures among them, at debug.
        logging.getLogger(name).setLevel(logging.WARNING)


def main() -> None:
    """Entry point of the server process; exits 0 when the file system was unmounted, else with a documented code."""
    parser = argparse.ArgumentParser(prog="trimsfs.daemon")
    parser.add_argument("--keeper-fd", type=int, required=True)
    arguments = parser.parse_args()
    keeper = Keeper(socket.socket(fileno=arguments.keeper_fd))
    # Ctrl-C in the foreground, or its terminal's end, reaches the whole group: the keeper unmounts, which ends
    # the server.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)
    failure: TrimsError | None = None
    try:
        order = json.load(sys.stdin)
        options = MountOptions.model_validate(order["options"])
        _configure_logging(options, foreground=order["foreground"])
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        trio.run(serve, options, Path(order["mountpoint"]), keeper)
    except* TrimsError as group:
        failure = _first(group)
    if failure is not None:
        log.error("%s", failure)
        keeper.failed(failure)
        sys.exit(exit_code(type(failure).__name__))


def _first(group: BaseExceptionGroup[TrimsError]) -> TrimsError:
    """The first error in a group."""
    error: TrimsError | BaseExceptionGroup[TrimsError] = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    main()
