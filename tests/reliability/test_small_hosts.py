"""A host of one core and 1 GiB, and one with thousands of other mounts.

Processor affinity and a control group stand in for the small host: its kernel and its other programs take nothing of
the 1 GiB. Keeper, servers, fetch processes, commands, readers and their page cache all do.
"""

import contextlib
import hashlib
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kubernetes.pods import own_capabilities
from tests.reliability.looks import restarts
from tests.services.seaweed import Seaweed
from tests.support.keepers import kill, serving
from tests.support.memory_group import killed, memory_group, used
from tests.support.mount_namespace import Apart, apart
from tests.support.mounts import MOUNTCTL, TRIMSFS, let_in, mounted, wait_until
from tests.support.survival import Survived

MIB = 1 << 20
MEMORY = 1024 * MIB
LARGE, PINNED, SMALL = 1280 * MIB, 512 * MIB, 4 * MIB
"""Sizes of models: one more than all of the memory, one half of it, and many small ones."""
SMALL_MODELS = 30
PIECE = 64 * MIB
READERS = 4
TIMEOUT_S = 300
_MAPPED = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
    print(hashlib.sha256(mapping).hexdigest())
"""


@dataclass(frozen=True, slots=True)
class SmallHost:
    """Runs programs on the first core, in a control group with all the memory that they have together."""

    group: Path

    @property
    def before(self) -> tuple[str, ...]:
        """Starts a program there."""
        enter = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.group / "cgroup.procs"))
        return ("taskset", "--cpu-list", "0", *enter)

    def start(self, *command: str | Path) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*self.before, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *command: str | Path) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*self.before, *map(str, command)], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )

    def succeed(self, *command: str | Path) -> str:
        done = self.run(*command)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sums(self, *paths: Path, mapped: int = 0) -> list[str]:
        """What as many programs find at the same time, each of one file; the first *mapped* of them by a mapping."""
        programs = [
            self.start(sys.executable, "-c", _MAPPED, path) if number < mapped else self.start("sha256sum", path)
            for number, path in enumerate(paths)
        ]
        found = []
        try:
            for program in programs:
                told, errors = program.communicate(timeout=TIMEOUT_S)
                assert program.returncode == 0, errors
                found.append(told.split()[0])
        finally:
            for program in programs:
                program.kill()
                program.communicate()
        return found


@pytest.fixture
def small_host() -> Iterator[SmallHost]:
    with memory_group(MEMORY) as processes:
        yield SmallHost(processes.parent)
        wait_until(lambda: processes.read_text() == "", 30)


def upload(server: Seaweed, bucket: str, sizes: dict[str, int], directory: Path) -> dict[str, str]:
    """Put objects of these sizes; their sums."""
    draw, sums, file = random.Random(5), {}, directory / "upload"
    with contextlib.closing(server.client()) as client:
        client.create_bucket(Bucket=bucket)
        for key, size in sizes.items():
            digest = hashlib.sha256()
            with file.open("wb") as content:
                for offset in range(0, size, PIECE):
                    piece = draw.randbytes(min(PIECE, size - offset))
                    digest.update(piece)
                    content.write(piece)
            client.upload_file(str(file), bucket, key)
            sums[key] = digest.hexdigest()
    file.unlink()
    return sums


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_core_and_1_gib_serve_models_larger_than_the_memory(
    small_host: SmallHost, seaweed: Seaweed, tmp_path: Path, survived: Survived
) -> None:
    small = {f"small/{number}": SMALL for number in range(SMALL_MODELS)}
    sums = upload(seaweed, "small-host", {"large": LARGE, "pinned": PINNED, **small}, tmp_path)
    operations = 0

    def check(names: list[str], *, mapped: int = 0) -> None:
        nonlocal operations
        assert small_host.sums(*(mount.path / name for name in names), mapped=mapped) == [sums[name] for name in names]
        operations += len(names)

    options = ("--min-free", "0", "--prefetch", "off")
    with mounted(
        "s3://small-host", tmp_path, *options, environment=seaweed.environment(), before=small_host.before
    ) as mount:
        check(["large"] * READERS, mapped=2)  # cold: together they fetch it once, but for what comes late
        assert LARGE <= mount.metrics()["trimsfs_fetch_fetched_bytes_total"] < 1.1 * LARGE
        small_host.succeed(TRIMSFS, "warm", mount.path / "small", mount.path / "pinned")
        manner = [] if _may_lock(PINNED) else ["--best-effort"]
        small_host.succeed(TRIMSFS, "pin", *manner, mount.path / "pinned")
        refused = small_host.run(TRIMSFS, "pin", mount.path / "large")
        assert refused.returncode == 9, refused.stderr
        assert refused.stderr.count("\n") == 1
        assert "may hold" in refused.stderr
        assert "raise its memory.max" in refused.stderr
        kill(mount)  # the next server locks what is pinned
        check(["large", "pinned", *small], mapped=2)
        small_host.succeed(MOUNTCTL, "restart", mount.path)
        serving(mount)
        check(["large"] * READERS, mapped=READERS)
        small_host.succeed(TRIMSFS, "status", mount.path)
        small_host.succeed(TRIMSFS, "ls", mount.path)
        small_host.succeed(TRIMSFS, "verify", mount.path / "small")
        assert restarts(mount) == 2
        _, anonymous = used(small_host.group)
        assert anonymous < MEMORY / 2
        assert "Traceback" not in mount.log()
    assert killed(small_host.group) == 0
    survived("models of more than the memory on one core and 1 GiB", injected=2, operations=operations)


def _may_lock(size: int) -> bool:
    """Whether a server that these tests start may lock so much memory: containers often have neither of both."""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return limit == resource.RLIM_INFINITY or limit >= size or "SYS_RESOURCE" in own_capabilities()


# Thousands of other mounts

MOUNTS = 4000
TRIES = 5
"""Of each command, the quickest counts."""
MOST_TIMES = 3
"""How many times as long a command may take beside them."""
_MANY = """
import ctypes, os, sys
libc, directory, count = ctypes.CDLL(None, use_errno=True), sys.argv[1], int(sys.argv[2])
for number in range(count):
    place = f"{directory}/{number}"
    os.mkdir(place)
    if libc.mount(b"tmpfs", place.encode(), b"tmpfs", ctypes.c_ulong(0), b"size=4k") != 0:
        raise OSError(ctypes.get_errno(), "mount")
"""


@pytest.mark.alone  # measures the machine
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_take_as_long_beside_thousands_of_mounts(store_directory: Path, tmp_path: Path) -> None:
    """As on a node of many containers. Each command is timed beside itself in a namespace without these mounts."""
    (store_directory / "model").write_bytes(b"weights")
    let_in(store_directory)
    took: dict[int, dict[str, float]] = {}
    for count in (0, MOUNTS):
        directory = tmp_path / f"{count}"
        for name in ("models", "others"):
            (directory / name).mkdir(parents=True)
        let_in(directory)
        prepare: list[str | Path] = [sys.executable, "-c", _MANY, directory / "others", f"{count}"]
        places = ("--cache-dir", directory / "cache", "--log-file", directory / "log")
        commands: dict[str, tuple[str | Path, ...]] = {
            "mount": (TRIMSFS, "mount", store_directory, directory / "models", *places),
            "read": ("cat", directory / "models/model"),
            "status": (TRIMSFS, "status", directory / "models"),
            "mountctl status": (MOUNTCTL, "status", directory / "models"),
            "restart": (MOUNTCTL, "restart", directory / "models"),
            "umount": (TRIMSFS, "umount", directory / "models"),
        }
        with apart(prepare) as namespace:
            assert len(namespace.mountinfo().splitlines()) > count
            try:
                tries = [{name: _took(namespace, *command) for name, command in commands.items()} for _ in range(TRIES)]
            finally:
                namespace.run(TRIMSFS, "umount", "--lazy", directory / "models")
        took[count] = {name: min(each[name] for each in tries) for name in commands}
    ratios = {name: seconds / took[0][name] for name, seconds in took[MOUNTS].items()}
    assert max(ratios.values()) < MOST_TIMES, ratios


def _took(namespace: Apart, *command: str | Path) -> float:
    """How long a command takes in a namespace, which must succeed."""
    began = time.monotonic()
    done = namespace.run(*command)
    assert done.returncode == 0, done.stderr
    return time.monotonic() - began
