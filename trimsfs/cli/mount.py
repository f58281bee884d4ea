"""``trimsfs mount``: checks the options, starts a keeper, and waits until the mount answers."""

import errno
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, NoReturn

import click
import platformdirs

from trimsfs.cli.control_client import check_answers
from trimsfs.cli.mount_options import MountCommand, mount_options
from trimsfs.cli.output import fail, reported
from trimsfs.cli.umount import STOP_TIMEOUT_S
from trimsfs.command_group import complete_path, examples
from trimsfs.errors import (
    BucketNotFoundError,
    CacheInUseError,
    CacheUnusableError,
    ConfigurationError,
    FuseUnavailableError,
    MountpointError,
    NotPermittedError,
)
from trimsfs.mountinfo import FILE_SYSTEM_TYPE, canonical, mount_at, mounts
from trimsfs.options import MountOptions, default_store, flag, keeper_order
from trimsfs.polling import readable
from trimsfs.processes import device_served_by, shown, usage
from trimsfs.text import or_free_space, printable
from trimsfs.tiers.disk.lock import holder_of, lock_holders

START_TIMEOUT_S = 60.0
_FOR_EXPORTER = ("HOME", "LANG", "LC_ALL", "PATH", "PYTHONPATH")
"""The variables that an exporter gets: no credentials of a store."""
_URL = re.compile(r"([a-z][a-z0-9+.]+):/*(.+)")
"""A URL, also with too few or too many slashes."""


class SourceFirst(MountCommand):
    """A command with an optional argument, the source, before a required one, the mount point."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        if ctx.params["mountpoint"] is None and not ctx.resilient_parsing:
            if ctx.params["source"] is None:
                raise click.MissingParameter(ctx=ctx, param_hint="'MOUNTPOINT'", param_type="argument")
            ctx.params["source"], ctx.params["mountpoint"] = None, Path(ctx.params["source"])
        return rest


@click.command(
    cls=SourceFirst,
    epilog=examples(
        "trimsfs mount s3://my-models/prefix /models",
        "trimsfs mount s3://my-models /models --cache-dir /var/cache/models --cache-size 500GiB",
        "trimsfs mount ~/.cache/huggingface/hub /hub",
    ),
)
@click.argument("source", metavar="[STORE]", required=False)
@click.argument("mountpoint", type=Path, shell_complete=complete_path, metavar="MOUNTPOINT", required=False)
@click.option("--foreground", is_flag=True, help="Stay in the terminal and log to it.")
@reported
@mount_options
def mount(mountpoint: Path, foreground: bool, options: MountOptions) -> None:
    """Mount a store of models at an empty directory.

    Creates the mount point if its parent directory exists. Returns when the mount answers. All options but
    --foreground can also be set in the configuration file (with _ for -) or the environment (TRIMSFS_STORE for
    --store). More options can only be set there: see docs/configuration.md, or `man trimsfs.toml`. trimsfs finds S3
    credentials as any AWS tool does.
    """
    if foreground and options.log_file is not None:
        warning = f"option --log-file {options.log_file}: not written with --foreground, which logs to the terminal"
        click.echo(f"trimsfs: warning: {printable(warning)}", err=True)
    mount_store(mountpoint, options, foreground=foreground)


def mount_store(mountpoint: Path, options: MountOptions, *, foreground: bool) -> None:
    """Mount, and return when the mount answers; in the foreground, never return. Raises TrimsError, or exits."""
    for _, own in options.each_store():
        check_meaning(mountpoint, own.store)
    made = mount_at(canonical(mountpoint)) is None and not mountpoint.exists()  # one that is mounted may hang
    try:
        _mount(_check(mountpoint, options), options, foreground=foreground)
    except BaseException:
        if made:
            with suppress(OSError):
                mountpoint.rmdir()
        raise


def _mount(mountpoint: Path, options: MountOptions, *, foreground: bool) -> None:
    """Mount at a checked mount point, see `mount_store`."""
    options = options.resolved(mountpoint)
    check_apart(mountpoint, options)
    make_default_store(options)
    order = keeper_order(mountpoint, options, foreground=foreground)
    keeper = [sys.executable, "-m", "mountctl.keeper"]
    if foreground:
        warn_of_full_disk(options)
        export(options)
        become(keeper, order)
    _start(keeper, order, options)
    check_answers(mountpoint)
    warn_of_full_disk(options)
    export(options)
    what = f"{len(options.stores)} stores are" if len(options.stores) > 1 else f"{options.each_store()[0][1].store} is"
    click.echo(f"{what} mounted at {printable(str(mountpoint))} (log: {options.log_file})")


def check_meaning(mountpoint: Path, store: str | None) -> None:
    """Refuse swapped arguments and misspelt stores. Raises ConfigurationError, BucketNotFoundError."""
    url = _URL.fullmatch(str(mountpoint))  # Path turns // into /
    if url is not None and not mountpoint.exists():
        first = f"trimsfs mount {url[1]}://{url[2]} {store or 'MOUNTPOINT'}"
        raise ConfigurationError(f"{url[1]}://{url[2]} is a store: name the mount point after it: `{first}`")
    if store is None or "://" in store:
        return
    if not os.path.lexists(store):
        url = _URL.fullmatch(store)
        if url is not None:
            raise ConfigurationError(f"store {store} is neither a URL nor a directory: write {url[1]}://{url[2]}")
        if not store.startswith(("/", ".")):
            missing = f"store directory {Path(store).absolute()} does not exist"
            scheme, slash, rest = store.partition("//")
            url_meant = f"{scheme.rstrip(':')}://{rest}" if slash else f"s3://{store}"
            raise BucketNotFoundError(f"{missing}: create it; a bucket is written {url_meant}")


def _check(mountpoint: Path, options: MountOptions) -> Path:
    """Check or create a mount point; its absolute path.

    Raises MountpointError, NotMountedError, FuseUnavailableError.
    """
    mountpoint = canonical(mountpoint)
    mounted = mount_at(mountpoint)
    if mounted is not None:
        remedy = f"end that first with `umount {mountpoint}`, or choose another"
        if mounted.kind == FILE_SYSTEM_TYPE:
            with suppress(NotPermittedError):
                check_answers(mountpoint)
            remedy = "use it, or unmount it with `trimsfs umount`"
        raise MountpointError(f"{mountpoint} is already mounted ({mounted.source}): {remedy}")
    try:
        with suppress(FileExistsError):
            mountpoint.mkdir(mode=0o755)
        with os.scandir(mountpoint) as entries:
            empty = next(entries, None) is None
    except FileNotFoundError:
        raise MountpointError(f"{mountpoint.parent} does not exist: create it with `mkdir -p`") from None
    except OSError as error:
        other = "choose a directory that exists" if error.errno == errno.EROFS else "choose another"
        remedy = or_free_space(error, other)
        raise MountpointError(f"{mountpoint}: {error.strerror}: {remedy}") from error
    if not empty:
        raise MountpointError(
            f"{mountpoint} is not empty: mounting would hide its files; {_elsewhere(mountpoint, options)}"
        )
    if not os.path.exists("/dev/fuse"):
        raise FuseUnavailableError("/dev/fuse does not exist: load the module with `modprobe fuse`")
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise FuseUnavailableError("fusermount3 is not installed: install the package fuse3, or mount as root")
    return mountpoint


def _elsewhere(mountpoint: Path, options: MountOptions) -> str:
    """What to do about a mount point that is not empty: perhaps it is the store."""
    store = options.store
    if store is None and not options.stores:
        return (
            "it was taken for the mount point, as no store is given: "
            f"if it is the store, write `trimsfs mount {mountpoint} MOUNTPOINT`, else choose another"
        )
    if store is not None and "://" not in store and not (os.path.isdir(store) and os.listdir(store)):
        return f"the store comes first: `trimsfs mount {mountpoint} {store}`"
    return "choose another"


def check_apart(mountpoint: Path, options: MountOptions) -> None:
    """Check that store, mount point, cache and log do not overlap. Raises ConfigurationError."""
    own = {"cache_dir": options.cache_dir, "log_file": options.log_file}
    for _, of_store in options.each_store():
        store = (of_store.store or "").removeprefix("file://")
        if "://" in store:
            continue
        root = Path(os.path.realpath(store))
        if root.is_relative_to(mountpoint) or mountpoint.is_relative_to(root):
            raise ConfigurationError(f"store {root} and mount point {mountpoint} overlap: choose another mount point")
        for name, path in own.items():
            if path is not None and Path(os.path.realpath(path)).is_relative_to(root):
                raise ConfigurationError(f"{flag(name)} {path}: lies in the store {root}: choose another")
    for name, path in own.items():
        if path is not None and Path(os.path.realpath(path)).is_relative_to(mountpoint):
            raise ConfigurationError(f"{flag(name)} {path}: lies on the mount point {mountpoint}: choose another")


def warn_of_full_disk(options: MountOptions) -> None:
    """Warn when the disk is too full to cache models."""
    assert options.cache_dir is not None
    try:
        place = next(place for place in (options.cache_dir, *options.cache_dir.parents) if place.is_dir())
        status = os.statvfs(place)
    except OSError:
        return  # the server will report it
    available = status.f_bavail * status.f_frsize
    if available <= options.min_free:
        click.echo(
            f"trimsfs: warning: {options.cache_dir}: {available >> 20} MiB available and --min-free keeps "
            f"{options.min_free >> 20}: models are not cached: free some space, lower --min-free or set --cache-dir",
            err=True,
        )


def export(options: MountOptions, *, log_to: IO[Any] | None = None) -> None:
    """Start the exporter of this host, if one is asked for and none listens there yet; warn where that fails.

    It logs to a file of its own, or to *log_to*.
    """
    if options.metrics_listen is None:
        return
    command = [sys.executable, "-m", "trimsfs", "exporter", "--while-mounted", "--listen", options.metrics_listen]
    directory = platformdirs.user_state_path("trimsfs") if os.geteuid() else Path("/var/log/trimsfs")
    place, remedy = directory / "exporter.log", "run `trimsfs exporter`"
    try:
        with nullcontext(log_to) if log_to else _open_log(place, remedy) as log_file:
            inherited = {name: os.environ[name] for name in _FOR_EXPORTER if name in os.environ}
            done = subprocess.run(
                command, stdout=log_file, stderr=subprocess.PIPE, env=inherited, text=True, check=False, cwd="/"
            )
        problem = done.stderr.strip().removeprefix("trimsfs: ")
    except CacheUnusableError as error:
        problem = str(error)
    if problem:
        click.echo(f"trimsfs: warning: no metrics over HTTP: {printable(problem)}", err=True)


def make_default_store(options: MountOptions) -> None:
    """Create the store if it is the default one, so that `trimsfs mount` works without any setup."""
    store = options.store
    if store is not None and not options.stores and "://" not in store and Path(store) == default_store():
        with suppress(OSError):
            Path(store).mkdir(mode=0o755, parents=True, exist_ok=True)


def become(program: list[str], order: dict[str, object]) -> NoReturn:
    """Turn this process into a keeper or launcher, with its order on standard input."""
    descriptor = os.memfd_create("trimsfs-order")
    os.write(descriptor, json.dumps(order).encode())
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.dup2(descriptor, 0)
    os.execv(program[0], program)


def _open_log(path: Path, remedy: str = "set --log-file") -> BinaryIO:
    """Open a log. Raises CacheUnusableError, also if another user could have placed it."""
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise CacheUnusableError(f"log file {path}: {error.strerror}: {or_free_space(error, remedy)}") from error
    status = os.fstat(descriptor)
    ours = stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid()
    if not ours or path.parent.stat().st_uid not in {0, os.geteuid()}:
        os.close(descriptor)
        raise CacheUnusableError(f"log file {path}: it, or its directory, belongs to another user: {remedy}")
    return os.fdopen(descriptor, "ab")


def _start(keeper: list[str], order: dict[str, object], options: MountOptions) -> None:
    """Start the keeper in the background, and wait until the mount is ready or has failed."""
    assert options.log_file is not None
    receiver, sender = os.pipe()
    with _open_log(options.log_file) as log_file:
        process = subprocess.Popen(
            [*keeper, "--status-fd", str(sender)],
            stdin=subprocess.PIPE,
            stdout=log_file,
            stderr=log_file,
            pass_fds=[sender],
            start_new_session=True,
            cwd="/",
        )
    os.close(sender)
    assert process.stdin is not None
    with suppress(BrokenPipeError), process.stdin:
        process.stdin.write(json.dumps(order).encode())
    if not readable([receiver], START_TIMEOUT_S):
        process.terminate()
        fail("", f"the mount was not ready in {START_TIMEOUT_S:.0f} s: see {options.log_file}")
    with os.fdopen(receiver) as status:
        answer = json.loads(status.readline() or "{}")
    if answer.get("type") == "ready":
        return
    with suppress(subprocess.TimeoutExpired):  # it may wait for a server that hangs
        process.wait(STOP_TIMEOUT_S)
    message = answer.get("error") or "the keeper ended"
    if answer.get("kind") == CacheInUseError.__name__:
        message += _who_keeps_it(options)
    fail(answer.get("kind", ""), message if "kind" in answer else f"{message}: see {options.log_file}")


def _who_keeps_it(options: MountOptions) -> str:
    """Who still uses the detached mount whose server holds the cache directory, for an error message.

    Or who holds it in place of a server that has ended. Empty if the mount is not detached, or if the kernel does not
    show it (before Linux 6.18).
    """
    assert options.cache_dir is not None
    server, seen = holder_of(options.cache_dir), lock_holders(options.cache_dir)
    if seen and server not in seen:
        return f"; {shown(seen[0])} holds its lock: end that"
    device = device_served_by(server) if server is not None else None
    if device is None or any(mount.device == device for mount in mounts()):
        return ""
    return f"; its mount was detached and is in use {usage(device)}: end that"
