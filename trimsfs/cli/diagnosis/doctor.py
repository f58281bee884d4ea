"""``trimsfs doctor``: checks whether this host is fit for a mount, and says what to fix."""

import importlib
import json
import logging
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click

from trimsfs.cli.control_client import check_answers, read_json
from trimsfs.cli.diagnosis.checks import Advice, Check, ProblemError, as_server, server_of
from trimsfs.cli.diagnosis.store_checks import check_store
from trimsfs.cli.mount_options import MountCommand, mount_options
from trimsfs.cli.output import reported, say
from trimsfs.command_group import examples
from trimsfs.errors import (
    CacheInUseError,
    ConfigurationError,
    NotPermittedError,
    TrimsError,
)
from trimsfs.mountinfo import canonical, file_systems, holding
from trimsfs.options import ENVIRONMENT_PREFIX, MountOptions, declared_mountpoint, places
from trimsfs.plugins import load, plugins
from trimsfs.text import printable
from trimsfs.tiers.disk.lock import lock_directory
from trimsfs.tiers.extents import can_share

OLDEST_KERNEL = (5, 14)
CAP_SYS_RESOURCE = 24
"""The number of the capability to raise limits."""
TEST_MOUNT_TIMEOUT_S = 90.0
"""Longer than `trimsfs mount` waits, which says more."""
_MAY_ENTER = '[ -x "$one" ]'


@click.command(
    cls=MountCommand,
    epilog=examples(
        "trimsfs doctor --store s3://my-models", "trimsfs doctor --config /etc/trimsfs/mounts.d/models.toml"
    ),
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@reported
@mount_options
def doctor(options: MountOptions, as_json: bool) -> None:
    """Check this host, the cache directory and the store.

    Takes the options of `trimsfs mount`. Without a mount point in the configuration file, /models is an example of one.

    Prints a line for each check: ok, note (something could be better) or FAIL. Exits 1 if a check fails.
    """
    options = options.resolved(_mountpoint(click.get_current_context().params["config"]))
    checks: list[tuple[str, Check]] = [
        ("kernel", _kernel),
        ("/dev/fuse", _device),
        ("privileges", _privileges),
        ("libfuse", _libfuse),
        ("cache", _cache),
        ("sharing", _sharing),
        ("passthrough", _passthrough),
        ("memory", _memory),
        ("locked memory", _locked_memory),
        *((f"store {place.path.rstrip('/')}".rstrip(), partial(check_store, place)) for place in places(options)),
        *_extras(options),
        ("mounts", _mounts),
    ]
    logging.getLogger("trimsfs").addHandler(logging.NullHandler())  # the checks report, not the log
    done: list[dict[str, str]] = []
    for name, check in checks:
        try:
            result, message = "ok", check(options)
        except Advice as advice:
            result, message = "note", str(advice)
        except (ProblemError, TrimsError, OSError) as problem:
            result, message = "FAIL", str(problem)
        done.append({"check": name, "result": result, "message": message})
        if not as_json:
            say(f"{result:<4}  {name}: {message}")
    if as_json:
        click.echo(json.dumps(done, indent=2))
    sys.exit(1 if any(one["result"] == "FAIL" for one in done) else 0)


def _mountpoint(configs: Sequence[Path]) -> Path:
    """The mount point that a configuration file declares, for the defaults that depend on it; else an example."""
    for file in configs:
        with suppress(ConfigurationError):
            return canonical(declared_mountpoint(file))
    return Path("/models")


def _kernel(_: MountOptions) -> str:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    if numbers < OLDEST_KERNEL:
        raise ProblemError(f"Linux {release} is too old: use {OLDEST_KERNEL[0]}.{OLDEST_KERNEL[1]} or newer")
    return f"Linux {release}"


def _device(_: MountOptions) -> str:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise ProblemError("does not exist: load the module with `modprobe fuse`") from None
    except OSError as error:
        raise ProblemError(f"{error.strerror}: give this user or container access to it") from None
    return "can be opened"


def _privileges(options: MountOptions) -> str:
    if os.geteuid() == 0:
        return "root: mounts by itself, every local user may read"
    if shutil.which("fusermount3") is None:
        raise ProblemError("fusermount3 is not installed: install the package fuse3, or mount as root")
    if options.allow_other:
        configuration = Path("/etc/fuse.conf")
        lines = configuration.read_text().splitlines() if configuration.exists() else []
        if "user_allow_other" not in map(str.strip, lines):
            raise ProblemError("--allow-other needs the line user_allow_other in /etc/fuse.conf")
    return f"uid {os.geteuid()}: mounts through fusermount3"


def _libfuse(_: MountOptions) -> str:
    libfuse = importlib.import_module("trimsfs.fuse._libfuse").LIBFUSE
    return f"libfuse {libfuse}, pyfuse3 {version('pyfuse3')}"


def _cache(options: MountOptions) -> str:
    directory = options.cache_dir
    assert directory is not None
    use = "the first mount creates it"
    if directory.exists():
        try:
            os.close(lock_directory(directory))
            use = "free"
        except CacheInUseError as error:
            use = str(error).removeprefix(f"cache directory {directory} is ").partition(": unmount that")[0]
    place = _existing(directory)
    if not os.access(place, os.W_OK | os.X_OK):
        raise ProblemError(f"{directory}: {place} is not writable: set --cache-dir")
    closed = as_server(options, _MAY_ENTER, [*reversed(place.parents), *([place] if place != directory else [])])
    if closed:
        raise ProblemError(
            f"{directory}: {server_of(options)} may not enter {closed[0]}: set --cache-dir or --server-user"
        )
    status = os.statvfs(place)
    available = status.f_bavail * status.f_frsize
    if available <= options.min_free:
        raise ProblemError(
            f"{directory}: {available >> 20} MiB available, and --min-free keeps {options.min_free >> 20}: "
            "free some space or set --cache-dir"
        )
    return f"{directory}: {use}, {available >> 20} MiB available"


def _sharing(options: MountOptions) -> str:
    if not options.share_chunks:
        return "models do not share equal blocks on disk: --share-chunks turns that on"
    assert options.cache_dir is not None
    place = _existing(options.cache_dir)
    if not can_share(place):
        raise Advice(f"{place}: only what differs is fetched, but this file system shares no blocks: XFS and btrfs do")
    return "models share equal blocks on disk"


def _existing(directory: Path) -> Path:
    """A directory, or the nearest one above it that exists."""
    return next(place for place in (directory, *directory.parents) if place.is_dir())


def _passthrough(options: MountOptions) -> str:
    """Mount an empty store for a moment, with a cache beside the real one: only the kernel knows."""
    if not options.passthrough:
        raise Advice("switched off by passthrough = false: files are served in cached mode")
    assert options.cache_dir is not None
    place = _existing(options.cache_dir)
    if place == options.cache_dir and as_server(options, _MAY_ENTER, [place]):
        place = place.parent  # a server of another user has used it; a mount hands it over, as a whole
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory(dir=place) as cache:
        Path(scratch).chmod(0o755)  # the server is not root
        mountpoint, store = Path(scratch, "mount"), Path(scratch, "store")
        for directory in (mountpoint, store):
            directory.mkdir()
        trimsfs = [sys.executable, "-P", "-m", "trimsfs"]  # -P: import nothing from this directory
        mount = [*trimsfs, "mount", str(mountpoint), "--store", str(store), "--cache-dir", cache]
        mount += ["--log-file", str(Path(scratch, "log")), "--min-free", "0"]
        environment = os.environ | {f"{ENVIRONMENT_PREFIX}CONFIG": os.devnull, f"{ENVIRONMENT_PREFIX}GPU": "off"}
        try:
            done = subprocess.run(
                mount, env=environment, capture_output=True, text=True, timeout=TEST_MOUNT_TIMEOUT_S, check=False
            )
            if done.returncode != 0:
                said = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
                raise ProblemError(f"a test mount failed: {said[-1].removeprefix('trimsfs: ')}")
            answer = read_json(mountpoint / ".trims/control")["passthrough"]
        except subprocess.TimeoutExpired:
            log_file = Path(scratch, "log")
            last = log_file.read_text(errors="replace").splitlines()[-1:] if log_file.exists() else []
            log_line = f"; the last line of its log: {printable(last[0])}" if last else ""
            raise ProblemError(f"a test mount was not ready in {TEST_MOUNT_TIMEOUT_S:.0f} s{log_line}") from None
        finally:
            _unmount([*trimsfs, "umount", str(mountpoint)])
    if not answer["used"]:
        raise Advice(f"files are served in cached mode: {answer['reason']}")
    return "the kernel reads local copies by itself"


def _unmount(command: Sequence[str]) -> None:
    """Unmount a test mount, busy or not; there may be none."""
    for options in ((), ("--lazy",)):
        with suppress(subprocess.TimeoutExpired):
            done = subprocess.run([*command, *options], capture_output=True, timeout=60, check=False)
            if done.returncode == 0:
                return


def _memory(options: MountOptions) -> str:
    assert options.cache_dir is not None
    mount = holding(options.cache_dir.resolve())
    available = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    facts = f"{available >> 20} MiB available"
    if mount is not None and mount.kind == "tmpfs":
        return f"{facts}; the cache directory is in memory: disk and host tier in one"
    if options.cache_size is not None and options.cache_size <= available // 2:
        raise Advice(
            f"{facts}: --cache-size fits: put the cache directory on `mount -t tmpfs -o huge=always,size="
            f"{(options.cache_size + options.min_free) >> 20}m tmpfs DIR`, for mappings by huge page (lost at reboot)"
        )
    return facts


def _locked_memory(_: MountOptions) -> str:
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    status = Path("/proc/self/status").read_text()
    if limit == resource.RLIM_INFINITY or int(status.partition("CapEff:")[2].split()[0], 16) >> CAP_SYS_RESOURCE & 1:
        return "no limit: `trimsfs pin` locks whole models"
    raised = "raise it (ulimit -l, LimitMEMLOCK=)" + (" or give root CAP_SYS_RESOURCE" if os.geteuid() == 0 else "")
    raise Advice(f"at most {limit >> 20} MiB: `trimsfs pin` keeps what is more on disk only: {raised}")


def _extras(options: MountOptions) -> Iterator[tuple[str, Check]]:
    """The checks of the extras that the options ask for."""
    for place in plugins("doctor").values():
        yield from load(place)(options)


def _mounts(_: MountOptions) -> str:
    for mount in file_systems():
        with suppress(NotPermittedError):
            check_answers(mount.mountpoint)
    return ", ".join(f"{mount.mountpoint} ({mount.source})" for mount in file_systems()) or "none"
