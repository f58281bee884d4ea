"""A mount namespace of a test's own, without copies of the mounts of others, which would keep them."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SCRIPT = """
for mount in $(findmnt --noheadings --list --types fuse.trimsfs --output TARGET); do
    test "$mount" = "$1" || umount --lazy "$mount" 2>/dev/null || true  # it has ended meanwhile
done
shift
"$@"
echo ready
exec cat
"""


@contextmanager
def mounted_apart(mountpoint: Path, *mount: str | Path) -> Iterator[Path]:
    """Run a *mount* command in a namespace whose only mount of trimsfs is that at *mountpoint*. Yields its root."""
    command = ["unshare", "--mount", "sh", "-euc", _SCRIPT, "sh", str(mountpoint), *map(str, mount)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            assert holder.stdout.readline() == "ready\n"
            yield Path(f"/proc/{holder.pid}/root")
        finally:
            holder.kill()
