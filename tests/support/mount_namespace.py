"""Mount namespaces of a test's own, without copies of the mounts of others, which would keep them."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 90
_OTHERS_ENDED = """
for mount in $(findmnt --noheadings --list --types fuse.trimsfs --output TARGET); do
    case "$mount/" in
        "$1"/*) ;;
        *) umount --internal-only --lazy "$mount" 2>/dev/null || true ;;  # it may have ended meanwhile
    esac
done
shift
exec "$@"
"""
_READY = '"$@"; echo ready; exec cat'


def own_mounts(of: Path = Path("/")) -> tuple[str, ...]:
    """Before a program in a new mount namespace: only mounts of trimsfs in the directory *of* stay, by default none."""
    return ("sh", "-euc", _OTHERS_ENDED, "sh", str(of))


@dataclass(frozen=True, slots=True)
class Apart:
    """A mount namespace, by the process that holds it. *before* starts a program in other namespaces as well."""

    holder: "subprocess.Popen[str]"
    before: Sequence[str] = ()

    @property
    def root(self) -> Path:
        """Its root, as seen from outside."""
        return Path(f"/proc/{self.holder.pid}/root")

    @property
    def inside(self) -> tuple[str, ...]:
        """Starts a program there."""
        return (*self.before, "nsenter", f"--mount=/proc/{self.holder.pid}/ns/mnt", "--")

    def mountinfo(self) -> str:
        """Its mounts, as the kernel lists them."""
        return Path(f"/proc/{self.holder.pid}/mountinfo").read_text()

    def run(self, *command: str | Path, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a program there, whatever it returns; TRIMSFS_* variables of the tests do not reach it."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TRIMSFS_", "TMPDIR"))}
        return subprocess.run(
            [*self.inside, *map(str, command)],
            env=inherited | {"TRIMSFS_CONFIG": "/dev/null"} | variables,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
            cwd="/",
        )


@contextmanager
def apart(prepare: Sequence[str | Path], *, but: Path = Path("/"), before: Sequence[str] = ()) -> Iterator[Apart]:
    """A namespace that a command has prepared, without any mount of trimsfs *but* one. *before* is as of `Apart`."""
    command = ["unshare", "--mount", *own_mounts(but), "sh", "-euc", _READY, "sh", *map(str, prepare)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "ready\n"
            yield Apart(holder, before)
        finally:
            holder.kill()


@contextmanager
def mounted_apart(mountpoint: Path, *mount: str | Path) -> Iterator[Path]:
    """Run a *mount* command in a namespace whose only mount of trimsfs is that at *mountpoint*. Yields its root."""
    with apart(mount, but=mountpoint) as namespace:
        yield namespace.root
