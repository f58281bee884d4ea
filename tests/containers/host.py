"""A shared directory of a host, in which models are mounted."""

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.containers.engines import mountctl, run
from tests.support.mounts import MountedStore, mounted

MODELS = {"resnet50/params": 3_000_000, "bert/params": 100, "tenant-a/gpt/params": 5000, "tenant-b/secret/params": 5000}


@dataclass(frozen=True, slots=True)
class Host:
    """A store, and a directory in which it is mounted again and again."""

    directory: Path
    store: Path

    @property
    def shared(self) -> Path:
        """The directory that containers bind with rslave."""
        return self.directory / "shared"

    def mounted(self, *options: str) -> AbstractContextManager[MountedStore]:
        """Mount the store below the shared directory."""
        return mounted(self.store, self.shared, "--cache-dir", str(self.directory / "cache"), *options)

    def content(self, name: str) -> bytes:
        """The bytes of a file in the store."""
        return (self.store / name).read_bytes()

    def digest(self, name: str) -> str:
        """What sha256sum tells of a file in the store."""
        return hashlib.sha256(self.content(name)).hexdigest()


def entered_by_all(directory: Path) -> Path:
    """The directory, with what is above it open to all users, as above a real mount point."""
    for above in (directory, *directory.parents[:2]):
        above.chmod(0o755)
    return directory


@contextmanager
def prepared(directory: Path) -> Iterator[Host]:
    """Models in a store, and a shared directory to mount them in."""
    found = Host(entered_by_all(directory), directory / "store")
    for name, size in MODELS.items():
        path = found.store / name
        path.parent.mkdir(parents=True)
        path.write_bytes(Random(name).randbytes(size))
    found.shared.mkdir()
    done = mountctl("share", found.shared)
    assert done.returncode == 0, done.stderr
    try:
        yield found
    finally:
        run("umount", "--lazy", found.shared)
