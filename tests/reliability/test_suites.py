"""fio's verification, the one suite of others that can be had from a package: every block that it has laid out in the
store tells its own offset and checksum, and is read through the mount by every way that fio knows."""

import errno
import itertools
import json
import random
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.mounts import mounted, trimsfs
from tests.support.survival import Survived

JOBS = 8
SIZE = 1 << 20
"""Bytes that each job reads, and of each file."""
BLOCK = 4096
"""Bytes that have a checksum of their own."""
ENGINES = ("sync", "psync", "pvsync2", "mmap", "splice", "posixaio", "libaio", "io_uring")
FEW = ("psync", "mmap", "io_uring")
TIMEOUT_S = 200


@dataclass(frozen=True, slots=True)
class Way:
    """How files are read: fio's engine, past the page cache or not, and whether all jobs read one file."""

    engine: str
    direct: bool = False
    shared: bool = False

    @property
    def name(self) -> str:
        """The files that are read in this way, so that they are cold to it."""
        return f"{self.engine}-{int(self.direct)}-{int(self.shared)}"

    def section(self, order: str, block: int) -> str:
        files = f"filename={self.name}.0" if self.shared else f"filename_format={self.name}.$jobnum"
        head = f"[{self.name}-{order}]\nstonewall\nnew_group\nrw={order}\nbs={block}\n{files}\n"
        return head + f"ioengine={self.engine}\ndirect={int(self.direct)}\niodepth=16"


def fio(directory: Path, sections: Iterable[str], scratch: Path, *options: str) -> list[dict[str, Any]]:
    """Run jobs in a directory; what fio tells of each."""
    job, report = scratch / "fio.job", scratch / "fio.json"
    common = ["[global]", f"directory={directory}", f"numjobs={JOBS}", f"size={SIZE}", f"filesize={SIZE}", "randseed=7"]
    common += [
        "verify=crc32c",
        f"verify_interval={BLOCK}",
        "verify_fatal=1",
        "verify_state_save=0",
        "group_reporting=1",
    ]
    job.write_text("\n".join([*common, *sections, ""]))
    command = ["fio", *options, "--output-format=json", f"--output={report}", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=scratch)
    text = report.read_text()
    if "{" not in text:
        raise AssertionError(done.stdout + done.stderr + text)
    jobs: list[dict[str, Any]] = json.loads(text[text.index("{") :])["jobs"]
    return jobs


def lay_out(store: Path, ways: Iterable[Way], scratch: Path) -> None:
    """Write what is to be verified; by a plain program, as a store's writer would."""
    sections = [
        f"[{way.name}]\nnew_group\nrw=write\nbs=64k\nioengine=psync\ndo_verify=0\nfilename_format={way.name}.$jobnum"
        for way in ways
    ]
    assert [job["error"] for job in fio(store, sections, scratch)] == [0] * len(sections)
    for file in store.iterdir():
        file.chmod(0o644)


def possible(store: Path, ways: Iterable[Way], scratch: Path) -> list[Way]:
    """The ways that there are on this host, as tried on the store itself."""
    ways = list(ways)
    jobs = fio(store, [way.section("read", BLOCK) for way in ways], scratch, "--readonly", "--eta=never")
    assert len(jobs) == len(ways)
    return [way for way, job in zip(ways, jobs, strict=True) if job["error"] == 0]


def verified(mount: Path, ways: list[Way], scratch: Path, *, seed: int) -> tuple[int, Counter[str]]:
    """Read all in every way, in order and at random; the blocks that were read, and errors by name."""
    draw = random.Random(seed)
    orders = [(way, order) for order in ("read", "randread") for way in ways]
    sections = [way.section(order, draw.choice([BLOCK, 16 * BLOCK, 64 * BLOCK])) for way, order in orders]
    errors: Counter[str] = Counter()
    blocks = 0
    for job in fio(mount, sections, scratch, "--readonly"):
        if job["error"]:
            errors[errno.errorcode.get(job["error"], str(job["error"]))] += 1
        blocks += job["read"]["io_bytes"] // BLOCK
    assert errors or blocks == len(sections) * JOBS * SIZE // BLOCK
    return blocks, errors


@pytest.fixture
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where fio writes what it finds."""
    return tmp_path_factory.mktemp("fio")


def check(
    every: list[Way], rounds: int, store: Path, scratch: Path, survived: Survived, mode: str, *options: str
) -> None:
    """Cold, warm, and after evictions."""
    lay_out(store, every, scratch)
    ways = possible(store, every, scratch)
    assert {"psync", "mmap"} <= {way.engine for way in ways}
    total, errors = 0, Counter[str]()
    with mounted(store, store.parent, mode, *options) as mount:
        for seed in range(rounds):
            if seed == rounds - 1 > 0:
                assert trimsfs("evict", mount.path).returncode == 0
            blocks, met = verified(mount.path, ways, scratch, seed=seed)
            total, errors = total + blocks, errors + met
    wrong = errors.pop("EILSEQ", 0)
    survived(
        f"fio verify, {' '.join((mode, *options))}",
        injected=len(ways) * 2 * rounds,
        operations=total,
        errors=errors,
        wrong=wrong,
    )


def test_fio_finds_no_wrong_block(store_directory: Path, scratch: Path, survived: Survived) -> None:
    few = [Way("psync"), Way("psync", direct=True), Way("mmap", shared=True), Way("io_uring")]
    check(few, 1, store_directory, scratch, survived, "passthrough=yes")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "options", "engines"),
    [
        ("passthrough=yes", (), ENGINES),
        ("passthrough=no", (), ENGINES),
        ("passthrough=no", ("--cold-open", "stream"), FEW),
        ("passthrough=yes", ("--cache-size", "8MiB"), FEW),  # less than is read
    ],
    ids=["passthrough", "cached", "stream", "small"],
)
def test_fio_finds_no_wrong_block_by_any_engine(
    mode: str,
    options: tuple[str, ...],
    engines: tuple[str, ...],
    store_directory: Path,
    scratch: Path,
    survived: Survived,
) -> None:
    ways = [Way(*way) for way in itertools.product(engines, [False, True], [False, True])]
    # fio 3.39 divides by zero when it is to map what is to be read directly.
    ways = [way for way in ways if (way.engine, way.direct) != ("mmap", True)]
    check(ways, 2, store_directory, scratch, survived, mode, *options)


def test_fio_would_find_a_wrong_block(store_directory: Path, scratch: Path) -> None:
    """One byte of a file that it laid out is another."""
    way = Way("psync")
    lay_out(store_directory, [way], scratch)
    with (store_directory / f"{way.name}.3").open("r+b") as file:
        file.seek(SIZE // 2 + 1234)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    _, errors = verified(store_directory, [way], scratch, seed=0)
    assert errors == {"EILSEQ": 2}
