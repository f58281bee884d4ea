"""Guests of QEMU without the processor's help, with Debian's kernel, that mount an image and read all of it."""

import functools
import gzip
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.mounts import trimsfs, wait_until
from tests.support.processes import run

KERNEL_PACKAGE = "linux-image-cloud-amd64"
MODULES = ("virtio_pci", "virtio_pmem", "nd_pmem", "erofs")
BOOT_S = 1200
TIMEOUT_S = 120
MEMORY_MIB = 384
_INIT = """#!/bin/sh
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module || echo "no $module"; done
mkdir /models
{mount} || echo "no mount"
echo "options $(grep ' /models ' /proc/mounts)"
cd /models && find . -type f | sort | xargs sha256sum | sed 's/^/sum /'
touch /models/new 2>&1 | sed 's/^/write /'
grep -E '^(Cached|MemAvailable)' /proc/meminfo | sed 's/^/memory /'
echo "all read"
read line
poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Guest:
    """A guest that has read all: what it said, and its process."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def lines(self, word: str) -> list[str]:
        """What it said in lines that begin with a word."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.removeprefix(f"{word} ").strip() for line in lines if line.startswith(f"{word} ")]

    def sums(self) -> dict[str, str]:
        """The SHA-256 of each file, by its path in the image."""
        return {name.removeprefix("./"): digest for digest, name in (line.split("  ", 1) for line in self.lines("sum"))}


@functools.cache
def kernel() -> tuple[Path, tuple[Path, ...]]:
    """Debian's kernel, and the modules that a guest loads, in their order; fetched once for all tests."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    place = Path(tempfile.gettempdir(), f"trimsfs-tests-kernel-{os.getuid()}")
    place.mkdir(exist_ok=True)
    depends = run("apt-cache", "depends", "--important", KERNEL_PACKAGE, check=True).stdout
    package = next(line.split()[1] for line in depends.splitlines() if "linux-image-" in line and "Depends" in line)
    root = place / package
    if not root.exists():
        subprocess.run(["apt-get", "-q", "download", package], cwd=place, check=True, timeout=300)
        new = root.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        subprocess.run(["dpkg-deb", "-x", next(place.glob(f"{package}_*.deb")), new], check=True, timeout=120)
        new.rename(root)
    version = package.removeprefix("linux-image-")
    base = root if (root / "lib").exists() else root / "usr"
    subprocess.run(["depmod", "-b", base, version], check=True, timeout=60)
    order = dict[Path, None]()
    for module in MODULES:
        shown = run("modprobe", "-d", base, "-S", version, "--show-depends", module, check=True).stdout
        order |= {Path(line.split()[1]): None for line in shown.splitlines() if line.startswith("insmod")}
    return root / f"boot/vmlinuz-{version}", tuple(order)


def initramfs(directory: Path, mount: str) -> Path:
    """What a guest boots into: busybox, the modules, and a program that mounts the image and reads all of it."""
    root = directory / "root"
    for name in ("bin", "proc", "sys", "dev", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy(shutil.which("busybox") or "/bin/busybox", root / "bin/busybox")
    (root / "bin/sh").symlink_to("busybox")
    names = []
    for module in kernel()[1]:
        content = module.read_bytes()
        if module.suffix == ".xz":
            content = subprocess.run(["xz", "-dc"], input=content, capture_output=True, check=True, timeout=60).stdout
        names.append(module.name.removesuffix(".xz"))
        (root / "modules" / names[-1]).write_bytes(content)
    (root / "modules/order").write_text("\n".join(names))
    (root / "init").write_text(_INIT.format(mount=mount))
    (root / "init").chmod(0o755)
    listing = "\n".join(str(path.relative_to(root)) for path in [root, *sorted(root.rglob("*"))])
    made = subprocess.run(
        ["busybox", "cpio", "-o", "-H", "newc"], cwd=root, input=listing.encode(), capture_output=True, check=True
    )
    archive = directory / "initramfs"
    archive.write_bytes(gzip.compress(made.stdout, 1))
    return archive


@contextmanager
def booted(paths: Sequence[Path], directory: Path, *, count: int) -> Iterator[list[Guest]]:
    """So many guests that mount one image of what is at *paths*, once all have read all of it."""
    image = directory / "models.erofs"
    done = trimsfs("image", *paths, "--output", image, "--run", "qemu")
    assert done.returncode == 0, done.stderr
    mount = done.stderr.splitlines()[-1].removeprefix("in the guest: ")
    vmlinuz, _ = kernel()
    archive = initramfs(directory, mount)
    guests: list[Guest] = []
    try:
        for number in range(count):
            log = directory / f"guest-{number}.log"
            command = [
                "qemu-system-x86_64",
                *("-M", "q35,accel=tcg", "-cpu", "max", "-m", f"{MEMORY_MIB}M,slots=2,maxmem=64G"),
                *("-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"),
                *("-kernel", vmlinuz, "-initrd", archive, "-append", "console=ttyS0 quiet panic=-1"),
                *shlex.split(done.stdout),
            ]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    list(map(str, command)), stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT
                )
            guests.append(Guest(process, log))
        for guest in guests:
            wait_until(lambda guest=guest: _has_read(guest), BOOT_S)  # type: ignore[misc]
        assert trimsfs("image", "--check", image).returncode == 0
        yield guests
    finally:
        for guest in guests:
            guest.process.kill()
            guest.process.communicate(timeout=TIMEOUT_S)


def _has_read(guest: Guest) -> bool:
    said = guest.log.read_text(errors="replace")
    assert guest.process.poll() is None, said[-2000:]
    return "all read" in said
