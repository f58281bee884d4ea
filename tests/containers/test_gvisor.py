"""gVisor: sandboxes of runsc read a mount, and map its one copy."""

import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.containers.engines import USERS, apart, mountctl, run, running, write_bundle
from tests.containers.host import Host
from tests.support.mounts import trimsfs
from tests.support.processes import family, mapped_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("runsc") is None, reason="gVisor's runsc is not installed"),
]
MODEL = "resnet50/params"
COLD = ("bert/params", "tenant-a/gpt/params")
ROUNDED = 8 << 10
"""Bytes by which shares are off: the kernel tells them in KiB."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A sandbox that runs a program."""

    runsc: tuple[str | Path, ...]
    name: str

    def read(self, *command: str) -> str:
        """What another program in it prints."""
        done = run(*apart(*self.runsc, "exec", self.name, *command))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def share_of(self, name: str) -> int:
        """Its bytes of a mapped file, divided among all that map the same pages. Its processes have one memory."""
        done = run(*apart(*self.runsc, "state", self.name))
        assert done.returncode == 0, done.stderr
        return max(mapped_bytes(pid, name) for pid in family(json.loads(done.stdout)["pid"]))


@contextmanager
def sandbox(directory: Path, root: Path, models: Path, *command: str) -> Iterator[Sandbox]:
    """A sandbox with models at /models, whose program has printed a line."""
    name = f"trimsfs-{uuid.uuid4().hex[:12]}"
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/models", "type": "bind", "source": str(models), "options": ["ro", "rbind"]},
    ]
    bundle = write_bundle(directory / name, root, command, USERS["user"], mounts=mounts)
    runsc = ("runsc", "--root", directory / "state", "--network", "none", "--ignore-cgroups")
    with running(*apart(*runsc, "run", "--bundle", bundle, name)) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("mapped "), line
            yield Sandbox(runsc, name)
        finally:
            run(*apart(*runsc, "delete", "--force", name))


def test_sandboxes_map_one_copy_while_servers_are_replaced(fresh_host: Host, root: Path, tmp_path: Path) -> None:
    size = len(fresh_host.content(MODEL))
    whole = -(-size // 4096) * 4096
    with fresh_host.mounted() as mount:
        assert trimsfs("warm", mount.path / MODEL).returncode == 0
        arguments = (tmp_path, root, mount.path, "probe", "map", f"/models/{MODEL}")
        with sandbox(*arguments) as one, sandbox(*arguments) as other:

            def shares() -> list[int]:
                return [each.share_of(MODEL) for each in (one, other)]

            for share in shares():
                assert abs(share - whole // 2) <= ROUNDED, "both map the same pages"
            done = mountctl("restart", mount.path)
            assert done.returncode == 0, done.stderr
            for each in (one, other):
                for name in (MODEL, *COLD):
                    assert each.read("sha256sum", f"/models/{name}").split()[0] == fresh_host.digest(name)
            assert abs(sum(shares()) - whole) <= ROUNDED
            assert trimsfs("evict", mount.path / MODEL).returncode == 12, "in use"
            with pytest.raises(AssertionError, match="Permission denied"):
                one.read("sh", "-c", "echo mine > /models/note")
