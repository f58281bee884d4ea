"""The kinds of hosts that are tried, and hosts: virtual machines with trimsfs installed from ``dist/``."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.machines.images import BOOKWORM, NEWEST, TRIXIE, Debian, image, version
from tests.machines.machine import Machine, booted

BY_PACKAGE = "apt-get -q -y install --no-install-recommends /dist/trimsfs_*.deb"
BY_WHEEL = """
    python3 -m venv /opt/trimsfs
    /opt/trimsfs/bin/pip install -q --no-index --find-links /dist/wheelhouse trimsfs
    ln -s /opt/trimsfs/bin/trimsfs /opt/trimsfs/bin/mountctl /usr/local/bin
    ln -s /opt/trimsfs/bin/mount.trimsfs /sbin/mount.trimsfs
    install -D -m 644 /dist/systemd/sysusers.conf /etc/sysusers.d/trimsfs.conf
    systemd-sysusers
    cp /dist/systemd/*.service /etc/systemd/system
    systemctl daemon-reload
    mkdir -p /etc/trimsfs/mounts.d
"""
SLOW = """
    mkdir -p /etc/systemd/system/trimsfs@.service.d
    printf '[Service]\\nTimeoutStartSec=900\\n' > /etc/systemd/system/trimsfs@.service.d/slow.conf
    systemctl daemon-reload
"""
"""A mount may take 900 s to start: a machine is slow."""
MODELS = """
    mkdir -p /store/many /models
    head -c 20M /dev/urandom > /store/model
    head -c 9M /dev/urandom > /store/other
    for number in $(seq 40); do head -c 5000 /dev/urandom > /store/many/$number; done
    cd /store && find . -type f -exec sha256sum {} + > /sums
    printf 'mountpoint = "/models"\\nstore = "/store"\\ncache_dir = "/var/cache/trimsfs/models"\\n' > /models.toml
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of host: its Debian, its kernel, and how trimsfs comes to it."""

    debian: Debian
    kernel: str
    install: str

    def __str__(self) -> str:
        return f"{self.debian.suite}-{self.kernel}"


KINDS = (
    Kind(BOOKWORM, "6.1", BY_WHEEL),
    Kind(TRIXIE, "6.1", BY_PACKAGE),
    Kind(TRIXIE, "6.12", BY_PACKAGE),
    Kind(TRIXIE, NEWEST, BY_PACKAGE),
)


@dataclass(frozen=True, slots=True)
class Host:
    """A machine with trimsfs, and with a directory of models, /store, whose sums /sums has."""

    kind: Kind
    machine: Machine

    @property
    def takes_over(self) -> bool:
        """Whether the kernel lets another server take over a mount, and passes reads through: Linux 6.9."""
        return self.linux >= (6, 9)

    @property
    def linux(self) -> tuple[int, int]:
        """The first two numbers of the kernel's version."""
        return version(self.machine.release)

    def run(self, script: str) -> str:
        """Run a shell script as root, which ends with its first error; what it prints."""
        return self.machine.run(script)


@contextmanager
def host_of(kind: Kind, distribution: Path, directory: Path) -> Iterator[Host]:
    """A host of a kind, with a disk in a directory; *distribution* is a disk with what is installed."""
    disks = ("-drive", f"file={distribution},if=virtio,format=raw,readonly=on")
    with booted(image(kind.debian), kind.kernel, directory, disks=disks) as machine:
        machine.run("mkdir /dist; echo '/dev/vdb /dist ext4 ro 0 0' >> /etc/fstab; mount /dist")
        machine.run(f"{kind.install}\n{SLOW}\n{MODELS}")
        yield Host(kind, machine)
