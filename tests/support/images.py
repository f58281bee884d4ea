"""File systems in files, for what the tests' own directory cannot do, and for how they fail."""

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.mounts import umount, wait_until

MAKERS = {"xfs": ("mkfs.xfs", 320 << 20), "btrfs": ("mkfs.btrfs", 256 << 20), "ext4": ("mkfs.ext4", 320 << 20)}
"""What makes a file system of a kind, and bytes that are enough for it."""
TIMEOUT_S = 60
_GOING_DOWN, _NO_LOG_FLUSH = 2 << 30 | 4 << 16 | ord("X") << 8 | 125, 2
"""XFS_IOC_GOINGDOWN, which is EXT4_IOC_SHUTDOWN as well."""
_FREEZE, _THAW = (3 << 30 | 4 << 16 | ord("X") << 8 | number for number in (119, 120))


class Image:
    """A file system of a kind in a file, which is not mounted yet. Skips the test where there can be none."""

    def __init__(self, kind: str, directory: Path, *, size: int | None = None) -> None:
        maker, least = MAKERS[kind]
        if shutil.which(maker) is None:
            pytest.skip(f"{maker} is not installed")
        self.kind = kind
        self.file, self.mountpoint = directory / f"{kind}.image", directory / kind
        with self.file.open("wb") as file:
            file.truncate(size or least)
        self.mountpoint.mkdir()
        subprocess.run([maker, "-q", str(self.file)], check=True, timeout=TIMEOUT_S)

    def mount(self, options: str = "loop") -> None:
        """Mount it; skips the test where that is not possible."""
        command = ["mount", "-t", self.kind, "-o", options, str(self.file), str(self.mountpoint)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        if done.returncode != 0:
            pytest.skip(f"cannot mount {self.kind}: {done.stderr.strip()}")

    def remount(self, how: str) -> None:
        """Let it be written no longer (``ro``), or again (``rw``)."""
        subprocess.run(["mount", "-o", f"remount,{how}", self.mountpoint], check=True, timeout=TIMEOUT_S)

    def unmount(self) -> None:
        """Unmount it, which nobody uses. Another test's new mount namespace may have a copy of it for a moment."""
        umount(self.mountpoint)
        wait_until(lambda: not self._attached())

    def _attached(self) -> bool:
        """Whether a loop device has the file."""
        command = ["losetup", "--noheadings", "--associated", str(self.file)]
        return bool(subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT_S).stdout)

    def restart(self) -> None:
        """Mount it anew, as a host that is started again does: what was not brought to the disk is gone."""
        self.unmount()
        self.mount()

    def remove(self) -> None:
        """Unmount it, whoever uses it, and remove it."""
        subprocess.run(["umount", "--lazy", self.mountpoint], check=False, timeout=TIMEOUT_S)
        self.file.unlink(missing_ok=True)
        self.mountpoint.rmdir()

    def move_to(self, directory: Path) -> None:
        """Move its file to another directory, and mount it again."""
        self.unmount()
        moved = directory / "image"
        subprocess.run(["cp", "--sparse=always", self.file, moved], check=True, timeout=TIMEOUT_S)
        self.file.unlink()
        self.file = moved
        self.mount()

    def power_off(self) -> None:
        """XFS and ext4: stop it. What has not been brought to the disk is lost, and all that is done on it fails."""
        self._control(_GOING_DOWN, struct.pack("=I", _NO_LOG_FLUSH))

    def fail(self) -> None:
        """ext4: have it find an error."""
        device = subprocess.run(
            ["findmnt", "-no", "SOURCE", str(self.mountpoint)],
            check=True,
            timeout=TIMEOUT_S,
            capture_output=True,
            text=True,
        ).stdout.strip()
        Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("1")

    def freeze(self) -> None:
        """Whoever writes to it waits, until `thaw`."""
        self._control(_FREEZE)

    def thaw(self) -> None:
        self._control(_THAW)

    def _control(self, request: int, argument: bytes = bytes(4)) -> None:
        descriptor = os.open(self.mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, request, argument)
        finally:
            os.close(descriptor)


@contextmanager
def image_of(kind: str, directory: Path, *, size: int | None = None) -> Iterator[Path]:
    """A file system of a kind, mounted for the length of the block; skips the test where there can be none."""
    image = Image(kind, directory, size=size)
    image.mount()
    try:
        yield image.mountpoint
    finally:
        image.remove()
