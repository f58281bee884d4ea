"""What sharing below the model saves and costs: ``python -m tests.benchmarks.sharing``, as root; takes some minutes.

Prints the tables of docs/sharing.md. Needs the environments of MXNet and of the other frameworks, and mkfs.xfs and
mkfs.btrfs.
"""

import argparse
import hashlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import trimsfs
from tests.frameworks import PROGRAMS
from tests.support.frameworks import ROOT, python_of
from tests.support.images import image_of
from tests.support.mounts import TRIMSFS, MountedStore, mounted
from trimsfs.formats import BufferSource, parse
from trimsfs.tiers.host.page_cache import MADV_POPULATE_READ

PAGE = 4096
CHUNK, PART = 8 << 20, 64 << 10
VARIANTS = {
    "head": "last layer trained",
    "classes": "last layer for 10 classes",
    "block": "last block trained",
    "statistics": "last layer trained, batch-norm statistics updated",
}
FILES = {
    "ResNet-50, MXNet `.params`": "ResNet-50-MXNet/{}/model.params",
    "ResNet-50, PyTorch": "ResNet-50/{}/model.pt",
    "ResNet-50, PyTorch, file renamed": "ResNet-50/{}/renamed.pt",
    "ResNet-50, safetensors": "ResNet-50/{}/model.safetensors",
    "ViT-B/16, PyTorch": "ViT-B16/{}/model.pt",
    "ViT-B/16, safetensors": "ViT-B16/{}/model.safetensors",
}
STORED = ("ResNet-50-MXNet/{}/model.params", "ResNet-50/{}/model.safetensors", "ViT-B16/{}/model.safetensors")
IMAGE_SIZE = 6 << 30
TIMEOUT_S = 600


def main() -> None:
    """Build the models, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="where the models are, or will be")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="trimsfs-sharing-") as scratch:
        models = options.directory or Path(scratch, "models")
        build(models)
        print_table(("model", "variant", "tensors", "whole pages", "8 MiB", "64 KiB", "4 KiB"), alike(models))
        store = Path(scratch, "store")
        for name in STORED:
            for variant in ("base", *VARIANTS):
                (store / name.format(variant)).parent.mkdir(parents=True)
                os.link(models / name.format(variant), store / name.format(variant))
        for kind in ("xfs", "btrfs"):
            with image_of(kind, Path(scratch), size=IMAGE_SIZE) as disk:
                disk_tables(kind, store, disk)


def build(models: Path) -> None:
    """Build what is not there."""
    for program, framework, directory in (
        ("variants_build", "others", models),
        ("mxnet_variants_build", "mxnet", models / "ResNet-50-MXNet"),
    ):
        command = [python_of(framework), "-W", "ignore", str(PROGRAMS / f"{program}.py"), str(directory)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)


def print_table(columns: Sequence[str], rows: Iterator[Sequence[object]]) -> None:
    """Print a table as it stands in the documentation, row by row."""
    print()
    for row in (columns, ["---"] * len(columns), *rows):
        print("|", " | ".join(map(str, row)), "|", flush=True)


# How much is alike


def alike(models: Path) -> Iterator[Sequence[object]]:
    """What part of a variant its base has: by tensor, by whole pages of tensors, and by block of each size."""
    for model, name in FILES.items():
        base = Content(models / name.format("base").replace("renamed", "model"))
        for variant, description in VARIANTS.items():
            if variant == "statistics" and "ViT" in model:
                continue  # it has no batch norms
            other = Content(models / name.format(variant))
            shares = (
                other.tensors_in(base),
                other.tensors_in(base, pages=True),
                other.blocks_in(base, CHUNK),
                other.blocks_in(base, PART, same_place=True),
                other.blocks_in(base, PAGE),
            )
            yield model, description, *(f"{100 * share / len(other.data):.0f} %" for share in shares)


class Content:
    """A model file, to be compared with others."""

    def __init__(self, path: Path) -> None:
        self.data = memoryview(path.read_bytes())
        self.tensors: dict[bytes, list[tuple[int, int]]] = {}
        for tensor in parse(BufferSource(self.data), path.name).tensors:
            place = (tensor.offset, tensor.nbytes)
            self.tensors.setdefault(_digest(self.data[tensor.offset : sum(place)]), []).append(place)

    def tensors_in(self, base: "Content", *, pages: bool = False) -> int:
        """Bytes of tensors that another file has, or of such pages as are whole and could be mapped from it."""
        found = 0
        for digest, places in self.tensors.items():
            for offset, size in places:
                remainders = {other % PAGE for other, _ in base.tensors.get(digest, [])}
                if not pages:
                    found += size if remainders else 0
                elif offset % PAGE in remainders:
                    found += max(0, (offset + size) // PAGE * PAGE - -(-offset // PAGE) * PAGE)
        return found

    def blocks_in(self, base: "Content", size: int, *, same_place: bool = False) -> int:
        """Bytes of blocks that another file has, at some place that is a multiple of the size or at the same."""
        ours, theirs = self._blocks(size), base._blocks(size)
        known = set(theirs)
        return sum(
            min(size, len(self.data) - number * size)
            for number, block in enumerate(ours)
            if (block in theirs[number : number + 1] if same_place else block in known)
        )

    def _blocks(self, size: int) -> list[bytes]:
        return [_digest(self.data[start : start + size]) for start in range(0, len(self.data), size)]


def _digest(data: memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


# What sharing saves and costs


def disk_tables(kind: str, store: Path, disk: Path) -> None:
    """Fill a cache, measure, have it shared, and measure again."""
    scratch = disk.with_name(f"{kind}-mount")
    scratch.mkdir()
    (scratch / "cache").symlink_to(disk)
    options = ("--min-free", "0")
    measured: dict[str, dict[str, str]] = {}
    with mounted(store, scratch, *options) as mount:
        read_all(mount.path)
        measured["before"] = warm(mount) | memory(mount) | {"disk": used(disk)}
        idle = cpu_seconds(mount)
        time.sleep(30)
        idle = cpu_seconds(mount) - idle
    with mounted(store, scratch, *options, "--share-chunks") as mount:
        read_all(mount.path)
        before = cpu_seconds(mount)
        started = time.monotonic()
        stall = read_latency(mount.path / STORED[-1].format("base"))
        while shared_bytes(mount) == 0 or waiting(mount) > 0:  # asked seldom: the answer takes processor time, too
            if time.monotonic() - started > TIMEOUT_S:
                sys.exit("not shared in time")
            time.sleep(2)
        cost = cpu_seconds(mount) - before - idle * (time.monotonic() - started) / 30
        quiet = read_latency(mount.path / STORED[-1].format("base"))
        shared = shared_bytes(mount)
        measured["after"] = warm(mount) | memory(mount) | {"disk": used(disk)}
    print(f"\n{kind}: {shared / 1e6:.0f} MB shared, {cost / shared * 1e9:.2f} s of processor time for each GB")
    print(f"reads of 4 KiB of the base, p50, p99, max, quiet: {quiet}; while it is shared: {stall}")
    print_table((kind, *measured), ((name, *(part[name] for part in measured.values())) for name in measured["before"]))


def read_all(mount: Path) -> None:
    """Have every model here."""
    for path in sorted(mount.glob("*/*/*")):
        with path.open("rb", buffering=0) as file:
            while file.read(CHUNK):
                pass


def used(disk: Path) -> str:
    """What is used of a disk."""
    os.sync()
    time.sleep(2)
    status = os.statvfs(disk)
    return f"{(status.f_blocks - status.f_bfree) * status.f_frsize / 1e6:.0f} MB"


def shared_bytes(mount: MountedStore) -> float:
    return mount.metrics()["trimsfs_sharing_shared_bytes_total"]


def waiting(mount: MountedStore) -> float:
    return mount.metrics()["trimsfs_sharing_waiting_blobs"]


def cpu_seconds(mount: MountedStore) -> float:
    """Processor time of the server so far."""
    fields = Path(f"/proc/{mount.control()['server_pid']}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def read_latency(path: Path, seconds: float = 12.0) -> str:
    """How long reads of 4 KiB at random take."""
    script = (
        "import os, random, sys, time\n"
        "file = os.open(sys.argv[1], os.O_RDONLY); size = os.fstat(file).st_size // 4096\n"
        "until, times = time.monotonic() + float(sys.argv[2]), []\n"
        "while time.monotonic() < until:\n"
        "    offset = random.randrange(size) * 4096; began = time.perf_counter()\n"
        "    os.pread(file, 4096, offset); times.append(time.perf_counter() - began); time.sleep(0.0002)\n"
        "times.sort(); print(*(f'{1e6 * times[int(part * (len(times) - 1))]:.0f} us' for part in (0.5, 0.99, 1)))"
    )
    command = [sys.executable, "-c", script, str(path), str(seconds)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def warm(mount: MountedStore) -> dict[str, str]:
    """What a model costs that is in memory: one that has given its blocks up, where they are shared."""
    path = mount.path / STORED[-1].format("head")
    buffer = bytearray(1 << 20)

    def open_and_close() -> None:
        os.close(os.open(path, os.O_RDONLY))

    def read() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    def enter() -> None:
        with path.open("rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            mapping.madvise(MADV_POPULATE_READ)

    def touch() -> None:
        with path.open("rb", buffering=0) as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            zlib.crc32(mapping)

    return {
        "open and close": f"{1e6 * median(open_and_close, 300):.0f} µs",
        "read": f"{1e3 * median(read, 9):.0f} ms",
        "map, enter every page": f"{1e3 * median(enter, 9):.1f} ms",
        "map, read every byte (CRC)": f"{1e3 * median(touch, 9):.0f} ms",
        "`trimsfs.open`": f"{1e3 * median(lambda: trimsfs.open(path).table, 50):.1f} ms",
    }


def median(function: Callable[[], object], times: int) -> float:
    """Seconds that a call takes."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def memory(mount: MountedStore) -> dict[str, str]:
    """What processes, one for each variant and all at once, have in memory of models of the mount."""
    found = {}
    for way, name, title in (
        ("numpy", STORED[-1], "memory, five ViT-B/16, `trimsfs.open`"),
        ("mxnet", STORED[0], "memory, five ResNet-50, MXNet after inference"),
    ):
        with ExitStack() as stack:
            processes = []
            for variant in ("base", *VARIANTS):
                process = stack.enter_context(_loading(way, mount.path / name.format(variant)))
                assert json.loads(_line(process))["output_sha256"]
                processes.append(process)
            kib = 0
            for process in processes:
                assert process.stdin is not None
                process.stdin.write("\n")
                process.stdin.flush()
                kib += json.loads(_line(process))["Pss"]
        found[title] = f"{kib * 1024 / 1e6:.0f} MB"
    return found


def _loading(way: str, path: Path) -> "subprocess.Popen[str]":
    python = [python_of("mxnet" if way == "mxnet" else "others"), "-W", "ignore"]
    return subprocess.Popen(
        [*([TRIMSFS, "run", "--"] if way == "mxnet" else []), *python, PROGRAMS / "variants_load.py", way, path],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


if __name__ == "__main__":
    main()
