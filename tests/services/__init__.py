"""S3 servers the tests start for themselves, on 127.0.0.1, and the means to start and stop them."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
CA_VARIABLES = ("AWS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
# /tmp may be in memory; /var/tmp is on disk by convention.
SCRATCH = Path("/var/tmp")
ROOT = Path(__file__).parents[2]

_BLOCK = 16
# Below Linux's default range of ephemeral ports, so that no client socket takes one meanwhile.
_BLOCK_STARTS = range(10240, 32768 - _BLOCK, _BLOCK)
_POLL = 0.05
_TAIL_LINES = 30


class ServiceError(RuntimeError):
    """A test server failed to start, to answer, or to do what was asked of it."""


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running S3 endpoint, the credentials it accepts, and the file of who signed its certificate if it has one.

    *pids* are the processes that answer, as far as they are known.
    """

    endpoint_url: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"
    ca_file: Path | None = None
    pids: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """Return the variables with which an AWS SDK or tool reaches this server and no other."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": HOST,
            # For SDKs, then for curl and for what is written in Go.
            **{name: str(self.ca_file) for name in CA_VARIABLES if self.ca_file is not None},
        }

    def client(self, **settings: Any) -> S3Client:
        """Return a new boto3 client of this server, with *settings* of its configuration; the caller closes it."""
        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=self.region,
            verify=None if self.ca_file is None else str(self.ca_file),
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                proxies={},
                **settings,
            ),
        )


@dataclass(frozen=True, slots=True)
class Daemon:
    """A server process of ours and the file that holds its log and its output."""

    name: str
    process: subprocess.Popen[bytes]
    log_file: Path

    def wait_until(self, ready: Callable[[], bool], timeout: float) -> None:
        """Return once `ready()` is true.

        Raises ServiceError, with the end of the log, when the daemon exits or `timeout` seconds
        pass first.
        """
        deadline = time.monotonic() + timeout
        while not ready():
            if (status := self.process.poll()) is not None:
                raise self.error(f"exited with status {status} while starting")
            if time.monotonic() > deadline:
                raise self.error(f"not ready after {timeout:g} s")
            time.sleep(_POLL)

    def error(self, problem: str) -> ServiceError:
        """Return the error that tells `problem` and the end of the daemon's log."""
        return ServiceError(f"{self.name}: {problem}\n{_tail(self.log_file)}")

    def stop(self, patience: float) -> None:
        """End the process by SIGTERM, or by SIGKILL after `patience` seconds, and reap it."""
        self.process.terminate()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            log.warning("%s ignored SIGTERM for %g s, killing it", self.name, patience)
            self.process.kill()
            self.process.wait()


def installed(program: str) -> str:
    """The path of a program that a package of Python's installs beside the interpreter."""
    return str(Path(sys.executable).with_name(program))


@contextlib.contextmanager
def run_daemon(
    name: str,
    argv: Sequence[str],
    log_file: Path,
    env: Mapping[str, str],
    patience: float = 10,
    cwd: Path | None = None,
) -> Iterator[Daemon]:
    """Run `argv` in the background, in `cwd`, its output appended to `log_file`, until the context ends.

    The kernel kills the process should the calling thread die first. Raises OSError when the
    program cannot be started.
    """
    with log_file.open("ab") as output:
        process = subprocess.Popen(
            _dying_with_us(argv),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=env,
            cwd=cwd,
            # A Ctrl-C at the terminal is for the tests, which then stop the daemons in order.
            start_new_session=True,
        )
    daemon = Daemon(name, process, log_file)
    try:
        yield daemon
    finally:
        daemon.stop(patience)


@contextlib.contextmanager
def started(
    name: str, command: Callable[[range], Sequence[str]], *, timeout_s: float = 30
) -> Iterator[tuple[range, Daemon]]:
    """Run a program, by its command line for free ports, in a scratch directory of its own until the context ends.

    Gives the ports and the daemon once it accepts connections at the first port. Raises ServiceError when it does not
    within *timeout_s* seconds.
    """
    with tempfile.TemporaryDirectory(prefix=f"trimsfs-{name}-", dir=SCRATCH) as scratch, reserved_ports() as ports:
        directory = Path(scratch)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with run_daemon(name, command(ports), directory / f"{name}.log", environment, cwd=directory) as daemon:
            daemon.wait_until(lambda: accepts(ports[0]), timeout_s)
            log.info("%s answers at port %d", name, ports[0])
            yield ports, daemon


def run_tool(argv: Sequence[str], env: Mapping[str, str], timeout: float, server: Daemon | None = None) -> str:
    """Run a program to its end and return its standard output.

    Raises ServiceError, with the end of the log of the `server` it talks to, when the program
    fails or takes longer than `timeout` seconds.
    """
    try:
        done = subprocess.run(
            _dying_with_us(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=env,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        problem = f"`{' '.join(argv)}` took longer than {timeout:g} s"
        raise (server.error(problem) if server else ServiceError(problem)) from late
    if done.returncode:
        problem = f"`{' '.join(argv)}` exited with status {done.returncode}: {done.stderr.strip()}"
        raise server.error(problem) if server else ServiceError(problem)
    return done.stdout


@contextlib.contextmanager
def reserved_ports() -> Iterator[range]:
    """Reserve a run of free TCP ports of 127.0.0.1 for as long as the context lasts.

    The port before them stays bound as their lock, which keeps concurrent test runs apart and
    which the kernel drops with the process. Raises ServiceError when none can be had.
    """
    for start in random.sample(_BLOCK_STARTS, len(_BLOCK_STARTS)):
        ports = range(start + 1, start + _BLOCK)
        with socket.socket() as lock:
            if _bind(lock, start) and all(map(_is_free, ports)):
                yield ports
                return
    raise ServiceError(f"no {_BLOCK} adjacent TCP ports of {HOST} are free")


def accepts(port: int, host: str = HOST) -> bool:
    """Return whether something accepts connections at a TCP port."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def _dying_with_us(argv: Sequence[str]) -> list[str]:
    # setpriv becomes the program, so the pid is the program's own. A preexec_fn could set the
    # same, but is unsafe, and from Python 3.12 warned about, in a process with threads.
    return ["setpriv", "--pdeathsig=KILL", "--", *argv]


def _bind(sock: socket.socket, port: int) -> bool:
    try:
        sock.bind((HOST, port))
    except OSError:
        return False
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # The servers set it too: a port with only connections in TIME_WAIT is free to them.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _bind(probe, port)


def _tail(log_file: Path) -> str:
    lines = log_file.read_text(errors="replace").splitlines() if log_file.exists() else []
    return "\n".join([f"--- end of {log_file.name} ---", *lines[-_TAIL_LINES:]])


def put(server: S3Server, bucket: str, objects: Mapping[str, bytes]) -> None:
    """Put objects into a bucket."""
    with contextlib.closing(server.client()) as client:
        for key, content in objects.items():
            client.upload_fileobj(io.BytesIO(content), bucket, key)
