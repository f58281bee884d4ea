"""The file systems compared. Each is mounted with an empty cache directory and unmounted at the end in any case."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.data import BUCKET
from tests.benchmarks.results import NATIVE, RCLONE, S3FS, TRIMSFS
from tests.services import S3Server, installed, run_daemon
from tests.support.mounts import mounted

START_S = 30
STOP_S = 20
MOUNTING_S = 3


@dataclass(frozen=True, slots=True)
class Mount:
    """Where the files are, where they are cached, and the processes that serve them."""

    path: Path
    cache: Path
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Contender:
    """``mount(directory, server)`` serves the bucket in ``directory/models`` with its cache in ``directory/cache``."""

    name: str
    mount: Callable[[Path, S3Server], AbstractContextManager[Mount]]


def native(files: Path) -> Contender:
    """Files of the local file system."""

    @contextmanager
    def mount(_directory: Path, _server: S3Server) -> Iterator[Mount]:
        yield Mount(files, files)

    return Contender(NATIVE, mount)


def trimsfs(*options: str, name: str = TRIMSFS, store: str = f"s3://{BUCKET}") -> Contender:
    """The file system of this project, over a store of the server that it is given."""

    @contextmanager
    def mount(directory: Path, server: S3Server) -> Iterator[Mount]:
        try:
            with mounted(store, directory, *options, environment=server.environment()) as mount:
                facts = mount.control()
                yield Mount(mount.path, mount.cache, (facts["server_pid"], facts["keeper_pid"]))
        except (KeyboardInterrupt, SystemExit):
            # The command that mounts ends with us. What it has started does not, and may be about to mount.
            time.sleep(MOUNTING_S)
            _unmount(directory / "models")
            raise

    return Contender(name, mount)


def rclone_environment(server: S3Server) -> dict[str, str]:
    """The variables by which rclone knows a server as the remote ``bench``."""
    remote = {
        "TYPE": "s3",
        "PROVIDER": "Other",
        "ENDPOINT": server.endpoint_url,
        "ACCESS_KEY_ID": server.access_key,
        "SECRET_ACCESS_KEY": server.secret_key,
        "REGION": server.region,
    }
    trust = {} if server.ca_file is None else {"RCLONE_CA_CERT": str(server.ca_file)}
    return {f"RCLONE_CONFIG_BENCH_{name}": value for name, value in remote.items()} | trust


@contextmanager
def _rclone(directory: Path, server: S3Server) -> Iterator[Mount]:
    arguments = [
        *(
            installed("rclone"),
            "mount",
            f"bench:{BUCKET}",
            str(directory / "models"),
            "--config=",
            "--read-only",
            "--allow-other",
        ),
        *("--vfs-cache-mode=full", f"--cache-dir={directory / 'cache'}"),
        # Names are believed as long as trimsfs does by default, and need no request for each object.
        *("--dir-cache-time=60s", "--attr-timeout=60s", "--use-server-modtime", "--vfs-fast-fingerprint"),
    ]
    with served(RCLONE, arguments, directory, rclone_environment(server)) as mount:
        yield mount


@contextmanager
def _s3fs(directory: Path, server: S3Server) -> Iterator[Mount]:
    directory.mkdir(parents=True, exist_ok=True)
    password = directory / "password"
    password.touch(mode=0o600)
    password.write_text(f"{server.access_key}:{server.secret_key}")
    options = [
        *("ro", "allow_other", "kernel_cache", "use_path_request_style", "sigv4", "listobjectsv2"),
        *(f"url={server.endpoint_url}", f"passwd_file={password}", f"use_cache={directory / 'cache'}"),
        *("parallel_count=16", "stat_cache_expire=60", "max_stat_cache_size=200000"),
    ]
    arguments = ["s3fs", BUCKET, str(directory / "models"), "-f", "-o", ",".join(options)]
    trust = {} if server.ca_file is None else {"CURL_CA_BUNDLE": str(server.ca_file)}
    with served(S3FS, arguments, directory, trust) as mount:
        yield mount


@contextmanager
def served(name: str, arguments: list[str], directory: Path, environment: Mapping[str, str]) -> Iterator[Mount]:
    """A FUSE server in the foreground as our child."""
    path = directory / "models"
    path.mkdir(parents=True, exist_ok=True)
    log, variables = directory / f"{name}.log", inherited() | dict(environment)
    # In a directory of its own: s3fs 1.95 may write, as it ends, to a path that it has freed.
    with run_daemon(name, arguments, log, variables, STOP_S, cwd=directory) as daemon:
        try:
            daemon.wait_until(lambda: os.path.ismount(path), START_S)
            yield Mount(path, directory / "cache", (daemon.process.pid,))
        finally:
            _unmount(path)


def inherited() -> dict[str, str]:
    """Our environment without what other tools take for settings of theirs: rclone refuses an AWS_CA_BUNDLE."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))}


def _unmount(path: Path) -> None:
    """Unmount, busy or not, if it is mounted."""
    unmount = ["umount", "--no-canonicalize", str(path)]
    for command in (unmount, [*unmount, "--lazy"]):
        with suppress(subprocess.TimeoutExpired):
            if subprocess.run(command, capture_output=True, timeout=STOP_S, check=False).returncode == 0:
                break


RCLONE_MOUNT = Contender(RCLONE, _rclone)
S3FS_MOUNT = Contender(S3FS, _s3fs)
