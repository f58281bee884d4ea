"""Disks of virtual machines: Debian by mmdebstrap, with the kernels of several releases; kept below build/machines."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import trimsfs

REPOSITORY = Path(trimsfs.__file__).parents[1]
KEPT = REPOSITORY / "build/machines"
MIRROR = "http://deb.debian.org/debian"
BUILD_TIMEOUT_S = 1800
DISK_BYTES = 8 << 30
"""The size of a disk, most of which is a hole."""
PACKAGES = (
    "apparmor",
    "attr",
    "btrfs-progs",
    "busybox-static",
    "ca-certificates",
    "crun",
    "dbus",
    "e2fsprogs",
    "fuse3",
    "kmod",
    "libpam-systemd",
    "libseccomp2",
    "openssh-server",
    "podman",
    "procps",
    "psmisc",
    "python3-venv",
    "sudo",
    "systemd-sysv",
    "udev",
    "xfsprogs",
)
KERNEL = "linux-image-cloud-amd64"
NEWEST = "newest"
"""The kernel of an image with the highest version."""
NETWORK = """\
[Match]
Type=ether
[Network]
DHCP=yes
"""
UNWANTED = ("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer")


@dataclass(frozen=True, slots=True)
class Debian:
    """A release of Debian for a machine; ``kernels`` are the suites to install a kernel from, oldest first."""

    suite: str
    kernels: tuple[str, ...]

    @property
    def sources(self) -> list[str]:
        """Lines for apt."""
        return [f"deb {MIRROR} {suite} main" for suite in dict.fromkeys((self.suite, *self.kernels))]


TRIXIE = Debian("trixie", kernels=("bookworm", "trixie", "trixie-backports"))
BOOKWORM = Debian("bookworm", kernels=("bookworm",))


@dataclass(frozen=True, slots=True)
class Image:
    """A disk that machines begin with and do not change, its kernels, and the key that root lets in."""

    directory: Path

    @property
    def disk(self) -> Path:
        return self.directory / "disk"

    @property
    def key(self) -> Path:
        return self.directory / "key"

    def kernel(self, kind: str) -> tuple[Path, Path]:
        """The kernel of a version, as ``6.12``, or NEWEST, and its initial file system."""
        kernels = sorted(self.directory.glob("vmlinuz-*"), key=lambda file: version(file.name.partition("-")[2]))
        if kind != NEWEST:
            kernels = [kernel for kernel in kernels if kernel.name.startswith(f"vmlinuz-{kind}.")]
        return kernels[-1], kernels[-1].with_name(kernels[-1].name.replace("vmlinuz", "initrd.img", 1))


def version(release: str) -> tuple[int, int]:
    """The first numbers of a kernel's release: (6, 12) of ``6.12.38+deb13-cloud-amd64``."""
    major, minor, *_ = release.split(".")
    return int(major), int(minor)


def image(debian: Debian) -> Image:
    """The image of a Debian, made anew if this module has changed since it was made."""
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    kept = KEPT / f"{debian.suite}-{digest}"
    if not kept.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT) as made:
            directory = Path(made) / "image"
            directory.mkdir()
            _make(debian, directory)
            directory.rename(kept)
    return Image(kept)


def _make(debian: Debian, directory: Path) -> None:
    root, key = directory.parent / "root", directory / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    command = ["mmdebstrap", "--quiet", "--variant=apt", f"--include={','.join(PACKAGES)}"]
    # The package that depends on a suite's kernel is upgraded from one suite to the next; all of its kernels stay.
    for suite in debian.kernels:
        install = f"apt-get install -q -y --no-install-recommends -t {suite} {KERNEL} initramfs-tools zstd"
        command.append(f'--customize-hook=DEBIAN_FRONTEND=noninteractive chroot "$1" {install} >&2')
    command += [debian.suite, str(root), *debian.sources]
    subprocess.run(command, check=True, timeout=BUILD_TIMEOUT_S, stdin=subprocess.DEVNULL)
    _configure(root, key.with_suffix(".pub").read_text())
    for file in [*root.glob("boot/vmlinuz-*"), *root.glob("boot/initrd.img-*")]:
        shutil.move(file, directory / file.name)
    disk = directory / "disk"
    disk.touch()
    os.truncate(disk, DISK_BYTES)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-d", root, disk], check=True, timeout=BUILD_TIMEOUT_S)


def _configure(root: Path, key: str) -> None:
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    (root / "root/.ssh/authorized_keys").write_text(key)
    (root / "etc/hostname").write_text("machine\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost machine\n::1 localhost\n")
    (root / "etc/systemd/network/ether.network").write_text(NETWORK)
    (root / "etc/fstab").write_text("/dev/vda / ext4 rw 0 1\n")
    shutil.rmtree(root / "var/cache/apt/archives", ignore_errors=True)
    subprocess.run(["systemctl", f"--root={root}", "-q", "enable", "systemd-networkd", "ssh"], check=True)
    subprocess.run(["systemctl", f"--root={root}", "-q", "mask", *UNWANTED], check=True)
