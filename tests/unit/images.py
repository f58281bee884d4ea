"""File systems in files, for what those can do that the tests' own directory does not lie on."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MAKERS = {"xfs": ("mkfs.xfs", 320 << 20), "btrfs": ("mkfs.btrfs", 256 << 20)}
"""What makes a file system of a kind, and bytes that are enough for it."""
TIMEOUT_S = 60


@contextmanager
def image_of(kind: str, directory: Path) -> Iterator[Path]:
    """A file system of a kind, mounted for the length of the block; skips the test where there can be none."""
    maker, size = MAKERS[kind]
    if shutil.which(maker) is None:
        pytest.skip(f"{maker} is not installed")
    image, mountpoint = directory / f"{kind}.image", directory / kind
    with image.open("wb") as file:
        file.truncate(size)
    mountpoint.mkdir()
    subprocess.run([maker, "-q", image], check=True, timeout=TIMEOUT_S)
    mount = ["mount", "-t", kind, "-o", "loop", str(image), str(mountpoint)]
    done = subprocess.run(mount, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    if done.returncode != 0:
        pytest.skip(f"cannot mount {kind}: {done.stderr.strip()}")
    try:
        yield mountpoint
    finally:
        subprocess.run(["umount", "--lazy", mountpoint], check=True, timeout=TIMEOUT_S)
        image.unlink()
