"""A disk whose writes are logged: a file that QEMU exports, below a loop device, with a file system mounted on it."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.reliability.write_log import logged
from tests.support.images import TIMEOUT_S, Image
from tests.support.mounts import umount

BYTES = 384 << 20


@dataclass(frozen=True, slots=True)
class LoggedDisk:
    """A mounted disk: ``before`` is what it held when the ``log`` began."""

    mountpoint: Path
    before: Path
    log: Path

    def requests(self) -> int:
        """How many requests have come to the disk."""
        return logged(self.log)


@contextmanager
def logged_disk(kind: str, directory: Path) -> Iterator[LoggedDisk]:
    """A new file system of a kind, mounted while the block lasts. Its files stay in the directory."""
    image = Image(kind, directory, size=BYTES)
    before, log, exported = (directory / name for name in ("before", "log", "exported"))
    subprocess.run(["cp", "--sparse=always", image.file, before], check=True, timeout=TIMEOUT_S)
    log.touch()
    exported.touch()
    with _exported(image.file, log, exported), _mounted(exported, image.mountpoint):
        yield LoggedDisk(image.mountpoint, before, log)


@contextmanager
def _exported(data: Path, log: Path, exported: Path) -> Iterator[None]:
    """*exported* is the same as *data*, and what is written to it is logged."""
    # The log's first sector tells of each request at once.
    filters = "driver=blklogwrites,node-name=logged,file=data,log=log,log-sector-size=512,log-super-update-interval=1"
    command = ["qemu-storage-daemon"]
    for node in (
        f"driver=file,node-name=data,filename={data}",
        f"driver=file,node-name=log,filename={log}",
        filters,
    ):
        command += ["--blockdev", node]
    export = f"type=fuse,id=export,node-name=logged,mountpoint={exported},writable=on,growable=off"
    with subprocess.Popen([*command, "--export", export], stdin=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while exported.stat().st_size != data.stat().st_size:
                assert process.poll() is None, "qemu-storage-daemon has ended"
                assert time.monotonic() < deadline, "qemu-storage-daemon exports nothing"
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            try:
                process.wait(TIMEOUT_S)
            finally:
                process.kill()


@contextmanager
def _mounted(file: Path, mountpoint: Path) -> Iterator[None]:
    command = ["losetup", "--find", "--show", "--direct-io=on", str(file)]
    device = subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S).stdout.strip()
    try:
        subprocess.run(["mount", device, mountpoint], check=True, timeout=TIMEOUT_S)
        try:
            yield
        finally:
            umount(mountpoint)
    finally:
        subprocess.run(["losetup", "--detach", device], check=False, timeout=TIMEOUT_S)


@contextmanager
def mounted_image(file: Path, mountpoint: Path) -> Iterator[None]:
    """An image is mounted as a host that boots mounts its disk: the journal is replayed."""
    subprocess.run(["mount", "-o", "loop", file, mountpoint], check=True, timeout=TIMEOUT_S)
    try:
        yield
    finally:
        umount(mountpoint)


def need_programs() -> str | None:
    """A program that is needed and not installed."""
    return next((program for program in ("qemu-storage-daemon", "losetup") if shutil.which(program) is None), None)
