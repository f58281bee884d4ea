"""The server's process: loads what it needs, gives up what it does not, and serves when its turn comes.

Started by the keeper as ``python -m trimsfs.daemon --keeper-fd N`` with the mount's options as JSON on standard input.
"""

import argparse
import contextlib
import ctypes
import encodings.idna  # noqa: F401 - wanted by the first request, when Python may be out of reach
import gc
import importlib
import json
import logging
import os
import resource
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import trio

from trimsfs import cuda
from trimsfs.cuda import CudaUnavailableError
from trimsfs.errors import CacheUnusableError, ConfigurationError, TrimsError
from trimsfs.exit_codes import exit_code
from trimsfs.fetch.copier import ThreadCopier
from trimsfs.fetch.speed import max_requests
from trimsfs.fetch.workers import Spawner
from trimsfs.formats import load_readers
from trimsfs.handover.keeper_client import Promotion, stand_by, tell_failure
from trimsfs.integrity.manifests import ReadManifest
from trimsfs.options import GPU_OFF, MountOptions
from trimsfs.server.lifecycle import Loaded, serve
from trimsfs.server.sandbox import (
    CAP_DAC_READ_SEARCH,
    HIGHEST_NICE,
    RLIMIT_NICE,
    become,
    fence,
    give,
    hindrance,
    identity,
    raised,
    set_apart,
)
from trimsfs.stores import DirectoryStore, Store, open_store
from trimsfs.stores.broker import Broker
from trimsfs.text import LineFormatter, set_process_title

log = logging.getLogger(__name__)

SERVER_NICENESS, STANDBY_NICENESS = -10, 10
SWITCH_INTERVAL_S = 0.0005
"""How long the event loop waits, at most, for a thread that runs Python; by default ten times as long."""
DEVICES = Path("/dev")


def _configure_logging(options: MountOptions) -> None:
    """Log to what the keeper logs to: a file that is its to open, and to keep short, or a terminal."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=options.log_level.upper(), handlers=[handler])
    sys.excepthook = lambda *raised: log.critical("ended by a defect", exc_info=raised)
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
        mountpoint = Path(order["mountpoint"])
        set_process_title("standby", mountpoint)
        options = MountOptions.model_validate(order["options"])
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        gc.freeze()  # so that what is put aside from here on is found quickly
        store = open_store(options, max_requests=max_requests(options.memory_limit))
        load_readers()
        no_gpu = _load_driver(options)
        read_manifest = _manifests(options)
        _settle_memory()
        cache_fails = _hand_over(options)
        if isinstance(store, DirectoryStore):
            _start_broker(options, store, mountpoint, keeper_end)
        _confine(options, cache_fails)
        gc.enable()
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        keeper_end, promotion = _await_turn(keeper_end, options, forks=order.get("forks", False))
        if promotion is not None and promotion.fuse is None and cache_fails is not None:
            raise cache_fails
        if promotion is not None:
            held = [keeper_end.fileno(), promotion.ledger, *filter(None, (promotion.lock, promotion.fuse))]
            set_process_title("server", mountpoint)
            spawner = Spawner(partial(_make_copier, options, store), mountpoint=mountpoint, not_for_it=held)
            _raise_priority()
            loaded = Loaded(store=store, spawner=spawner, no_gpu=no_gpu, read_manifest=read_manifest)
            trio.run(serve, options, mountpoint, keeper_end, promotion, loaded)
    except* TrimsError as group:
        failure = _first_error(group)
    if failure is not None:
        log.error("%s", failure)
        tell_failure(keeper_end, failure)
        sys.exit(exit_code(type(failure).__name__))


def _settle_memory() -> None:
    """What has been loaded stays: looking through it for garbage would hold the event loop up for tens of ms, and write
    to memory that this process is to share with those that it forks."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError):  # it is the C library of GNU that can give memory back
        ctypes.CDLL(None).malloc_trim(0)


def _load_driver(options: MountOptions) -> str | None:
    """Load the driver of GPUs while it can be found; why none can be used, if so."""
    if options.gpu == "off":
        return GPU_OFF
    try:
        cuda.load_driver()
    except CudaUnavailableError as error:
        return str(error)
    return None


def _manifests(options: MountOptions) -> ReadManifest | None:
    """What reads signed manifests, with its key, where files must be what is signed. Raises ConfigurationError."""
    if options.signatures == "off":
        return None
    try:
        signatures = importlib.import_module("trimsfs.integrity.signatures")  # which takes memory
    except ImportError as error:
        raise ConfigurationError(
            f"option --signatures {options.signatures}: {error}: pip install 'trimsfs[signatures]'"
        ) from None
    assert options.signing_key is not None
    return partial(signatures.read_manifest, key=signatures.load_key(options.signing_key))


def _start_broker(options: MountOptions, store: DirectoryStore, mountpoint: Path, keeper_end: socket.socket) -> None:
    """Start what reads for a server of root's mount the files that its own user may not read. Raises TrimsError."""
    if options.server_user is None or (user := identity(options.server_user)).uid == 0:
        return

    def confine() -> None:
        become(user, keep=CAP_DAC_READ_SEARCH)
        if options.fence:
            fence([])

    store.broker = Broker(store.local, confine=confine, mountpoint=mountpoint, not_for_it=[keeper_end.fileno()])


def _hand_over(options: MountOptions) -> CacheUnusableError | None:
    """Give the cache to the user that this process is to become, and begin to log; why the disk fails below the cache
    directory, if it does: who goes on with a mount can do without. Raises TrimsError."""
    assert options.cache_dir is not None
    _configure_logging(options)
    if options.server_user is None:
        return None
    try:
        give(options.cache_dir, identity(options.server_user))
    except CacheUnusableError as error:
        if not isinstance(error.__cause__, OSError):
            raise
        return error
    return None


def _confine(options: MountOptions, cache_fails: CacheUnusableError | None) -> None:
    """Give up what is not needed once everything is loaded. Raises TrimsError."""
    assert options.cache_dir is not None
    if options.server_user is not None:
        if raised(RLIMIT_NICE, HIGHEST_NICE):
            os.setpriority(os.PRIO_PROCESS, 0, STANDBY_NICENESS)  # until it is this process's turn
        else:
            _raise_priority()  # there is no other chance
        become(identity(options.server_user))
    with contextlib.suppress(OSError):  # before the fence: nothing is made beside it later
        options.cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    hindered = hindrance(options.cache_dir)
    if hindered is not None and cache_fails is None:
        raise CacheUnusableError(f"cache directory {options.cache_dir}: {hindered}: set --cache-dir or --server-user")
    if options.fence:
        os.environ["SQLITE_TMPDIR"] = str(options.cache_dir)
        fence(_writable(options))


def _writable(options: MountOptions) -> list[Path]:
    """What a server writes to."""
    assert options.cache_dir is not None
    return [options.cache_dir, *(DEVICES.glob("nvidia*") if options.gpu != "off" else ())]


def _await_turn(
    keeper_end: socket.socket, options: MountOptions, *, forks: bool
) -> tuple[socket.socket, Promotion | None]:
    """Stand by until it is this process's turn; if it *forks*, it first forks another one that stands by from then on.

    The channel to the keeper, of either process, and the promotion; None if the process is not needed any more.
    """
    promotion = stand_by(keeper_end, forks=forks)
    if promotion is None or promotion.standby is None:
        return keeper_end, promotion
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the keeper alone needs to know how it ends
    with socket.socket(fileno=promotion.standby) as end:
        try:
            forked = os.fork() == 0
        except OSError:
            forked = False  # the keeper finds the channel closed, and starts one
        if not forked:
            if options.fence:
                set_apart(_writable(options))
            return keeper_end, promotion
        os.setsid()
        keeper_end.close()
        for descriptor in filter(None, (promotion.ledger, promotion.lock, promotion.fuse)):
            os.close(descriptor)
        return _await_turn(end.dup(), options, forks=False)


def _raise_priority() -> None:
    """Get a core before other processes, as far as that is allowed: the opens of all programs wait for this one."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, SERVER_NICENESS)
        if os.getsid(0) == os.getpid():  # its own session
            Path("/proc/self/autogroup").write_text(str(SERVER_NICENESS))


def _make_copier(options: MountOptions, store: Store) -> ThreadCopier:
    """What a fetch process works with: the server's own store, where it can be shared."""
    requests = max_requests(options.memory_limit)
    return ThreadCopier(store if store.forkable else open_store(options, max_requests=requests), threads=requests)


def _first_error(group: BaseExceptionGroup[TrimsError]) -> TrimsError:
    """The first error in a group."""
    error: TrimsError | BaseExceptionGroup[TrimsError] = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
