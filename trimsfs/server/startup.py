"""The server process: loads its code, drops privileges, stands by, and serves once the keeper promotes it.

The keeper starts it as ``python -m trimsfs.daemon --keeper-fd N``, with the mount's options as JSON on standard input.
"""

import argparse
import contextlib
import ctypes
import encodings.idna  # noqa: F401 - for the first request: after the drop, Python's files may be unreadable
import gc
import json
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import trio

from trimsfs.errors import CacheUnusableError, ConfigurationError, TrimsError
from trimsfs.exit_codes import exit_code
from trimsfs.fetch.processes.thread_copier import ThreadCopier
from trimsfs.fetch.processes.workers import ForkedSpawner, fork_spawner
from trimsfs.fetch.store_requests import max_requests
from trimsfs.formats import load_readers
from trimsfs.handover.keeper_client import tell_failure
from trimsfs.integrity.manifests import ReadManifest
from trimsfs.options import MountOptions
from trimsfs.plugins import plugin
from trimsfs.server import sandbox
from trimsfs.server.lifecycle import serve
from trimsfs.server.plugin import ServerPlugin, load_plugins
from trimsfs.server.standby import await_turn
from trimsfs.stores.base import Store
from trimsfs.stores.broker import Broker
from trimsfs.stores.local_directory import DirectoryStore
from trimsfs.stores.open import after_fork, beneath, open_store
from trimsfs.stores.router import stores_of
from trimsfs.text import LineFormatter, set_process_title

log = logging.getLogger(__name__)

SERVER_NICENESS, STANDBY_NICENESS = -10, 10
SWITCH_INTERVAL_S = 0.0005
"""Longest wait of the event loop for a thread that runs Python. Python's default is ten times as long."""
DESCRIPTORS = 88
"""Open files that a server needs: some 25 of its own, and a quarter of all for models (`OpenBlobs`). A fetch process
needs no more: two for each of 32 requests, and some 15 of its own."""
STORE_DESCRIPTORS = 40
"""Open files that it needs besides for each store: its connections, for 32 reads and 8 other requests."""
FLEET_DESCRIPTORS = 128
"""Open files that it needs besides in a fleet: connections to members and from them."""


def _configure_logging(options: MountOptions) -> None:
    """Log to standard error: a file that the keeper has opened and rotates, or a terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
    sys.excepthook = lambda *raised: log.critical("server crashed: report the traceback", exc_info=raised)
    for name in ("azure", "boto3", "botocore", "google", "msal", "urllib3"):
        # At debug, they log headers with signatures.
        logging.getLogger(name).setLevel(logging.WARNING)


def main() -> None:
    """Run the server process. Exits with 0 after an unmount, else with a documented exit code."""
    parser = argparse.ArgumentParser(prog="trimsfs.daemon")
    parser.add_argument("--keeper-fd", type=int, required=True)
    arguments = parser.parse_args()
    keeper_end = socket.socket(fileno=arguments.keeper_fd)
    os.umask(0o077)
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # which leases send
    failure: TrimsError | None = None
    try:
        order = json.load(sys.stdin)
        mountpoint = Path(order["mountpoint"])
        set_process_title("standby", mountpoint)
        options = MountOptions.model_validate(order["options"])
        if order["foreground"]:
            options = options.model_copy(update={"log_file": None})  # it logs to standard error
        _may_open_files(options)
        gc.freeze()  # garbage collections skip what is loaded so far
        store = open_store(options, max_requests=max_requests(options.memory_limit))
        load_readers()
        read_manifest = _manifests(options)
        _configure_logging(options)
        extras = load_plugins(options, alone=order.get("alone", False))
        _settle_memory()
        cache_fails = _hand_over(options)
        _start_brokers(options, store, mountpoint, keeper_end)
        assert options.cache_dir is not None
        writable = [options.cache_dir, *(path for extra in extras for path in extra.writable())]
        _confine(options, writable, cache_fails)
        gc.enable()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        keeper_end, promotion = await_turn(keeper_end, options, writable, forks=order.get("forks", False))
        if promotion is not None and promotion.fuse is None and cache_fails is not None:
            raise cache_fails
        if promotion is not None:
            for extra in extras:
                options = extra.begin(options, mountpoint)
            held = [keeper_end.fileno(), promotion.ledger, *filter(None, (promotion.lock, promotion.fuse))]
            set_process_title("server", mountpoint)
            make_copier = partial(_make_copier, options, store, extras)
            spawner = ForkedSpawner(fork_spawner(make_copier, mountpoint=mountpoint, not_for_it=held))
            _raise_priority()
            run = partial(
                serve,
                store=store,
                spawner=spawner,
                plugins=extras,
                read_manifest=read_manifest,
                launched=order.get("launched", False),
            )
            trio.run(run, options, mountpoint, keeper_end, promotion)
    except* TrimsError as group:
        failure = _first_error(group)
    if failure is not None:
        log.error("%s", failure)
        tell_failure(keeper_end, failure)
        sys.exit(exit_code(type(failure).__name__))


def _may_open_files(options: MountOptions) -> None:
    """Raise the limit of open files, for this process and those that it forks, as far as it may be.

    Raises ConfigurationError if that is too little.
    """
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    needed = DESCRIPTORS + STORE_DESCRIPTORS * len(list(options.each_store()))
    needed += FLEET_DESCRIPTORS if options.fleet is not None else 0
    if hard < needed:
        raise ConfigurationError(
            f"limit of open files: it is {hard}, and this mount needs {needed}: raise it with `ulimit -n`, or "
            "LimitNOFILE= in its unit"
        )


def _settle_memory() -> None:
    """Exempt what is loaded from garbage collection, and give free memory back.

    A collection would block the event loop for tens of ms, and write to memory shared with forked processes.
    """
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError):  # only GNU's C library has it
        ctypes.CDLL(None).malloc_trim(0)


def _manifests(options: MountOptions) -> ReadManifest | None:
    """The reader of signed manifests, with its key; None if signatures are off. Raises ConfigurationError."""
    if options.signatures == "off":
        return None
    try:
        reader = plugin("signatures", "openssf")  # only if needed: it takes memory
    except ImportError as error:
        raise ConfigurationError(
            f"option signatures {options.signatures}: {error}: pip install 'trimsfs[signatures]'"
        ) from None
    assert options.signing_key is not None
    read_manifest: ReadManifest = reader(options.signing_key)
    return read_manifest


def _start_brokers(options: MountOptions, store: Store, mountpoint: Path, keeper_end: socket.socket) -> None:
    """Start a broker for each directory, if the server drops root: it reads files that the server's user may not.

    Raises TrimsError.
    """
    if options.server_user is None or (user := sandbox.identity(options.server_user)).uid == 0:
        return

    def confine() -> None:
        sandbox.become(user, keep=sandbox.CAP_DAC_READ_SEARCH)
        if options.fence:
            sandbox.fence([])

    not_for_it = [keeper_end.fileno()]
    for _, part in stores_of(store):
        if isinstance(directory := beneath(part), DirectoryStore):
            broker = Broker(directory.local, confine=confine, mountpoint=mountpoint, not_for_it=not_for_it)
            directory.broker = broker
            not_for_it = [*not_for_it, broker.fileno()]


def _hand_over(options: MountOptions) -> CacheUnusableError | None:
    """Give the cache directory to the user that this process will become. Raises TrimsError.

    Returns the error if the disk fails: a server that takes over a mount serves without a cache.
    """
    assert options.cache_dir is not None
    if options.server_user is None:
        return None
    try:
        sandbox.give(options.cache_dir, sandbox.identity(options.server_user))
    except CacheUnusableError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        return error
    return None


def _confine(options: MountOptions, writable: Sequence[Path], cache_fails: CacheUnusableError | None) -> None:
    """Drop privileges, once everything is loaded. Raises TrimsError."""
    assert options.cache_dir is not None
    if options.server_user is not None:
        if sandbox.raised(sandbox.RLIMIT_NICE, sandbox.HIGHEST_NICE):
            os.setpriority(os.PRIO_PROCESS, 0, STANDBY_NICENESS)  # until the keeper promotes this process
        else:
            _raise_priority()  # it cannot raise it later
        sandbox.become(sandbox.identity(options.server_user))
    with contextlib.suppress(OSError):  # before the fence forbids it
        options.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    hindered = sandbox.hindrance(options.cache_dir)
    if hindered is not None and cache_fails is None:
        raise CacheUnusableError(f"cache directory {options.cache_dir}: {hindered}: set --cache-dir or --server-user")
    if options.fence:
        os.environ["SQLITE_TMPDIR"] = str(options.cache_dir)
        sandbox.fence(writable)


def _raise_priority() -> None:
    """Raise this process's priority, if allowed: the opens of all programs wait for it."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, SERVER_NICENESS)
        if os.getsid(0) == os.getpid():  # it leads its session, so the group is its own
            Path("/proc/self/autogroup").write_text(str(SERVER_NICENESS))


def _make_copier(options: MountOptions, store: Store, extras: Sequence[ServerPlugin]) -> ThreadCopier:
    """The copier of a fetch process: it shares the server's store, if that works after a fork."""
    requests = max_requests(options.memory_limit)
    readers = (extra.peer_reader(requests) for extra in extras)
    peers = next((reader for reader in readers if reader is not None), None)
    return ThreadCopier(after_fork(store, options, max_requests=requests), threads=requests, peers=peers)


def _first_error(group: BaseExceptionGroup[TrimsError]) -> TrimsError:
    """The first error in a group."""
    error: TrimsError | BaseExceptionGroup[TrimsError] = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
