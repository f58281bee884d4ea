"""The first program that streams a file reads it through the server, and the kernel keeps no second copy of it."""

import hashlib
import mmap
import os
import random
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services.fast import start_fast
from tests.support.keepers import kill
from tests.support.mounts import MountedStore, mounted, trimsfs, wait_until
from tests.support.parts import blob_files
from tests.support.processes import run
from trimsfs.tiers.host.page_cache import resident_bytes

MIB, PAGE = 1 << 20, mmap.PAGESIZE
CONTENT = random.Random(38).randbytes(40 * MIB + 12345)
SIZE = len(CONTENT)
QUICK, SLOW = 16 * MIB, 2 * MIB
"""Bytes a second of each connection. The chunks come at once: all of a file is here after half a second, or four."""
HERE_S = 30.0
"""How long it may take until a file is resident."""
READS = "trimsfs_files_reads_total"


@dataclass(frozen=True, slots=True)
class Cold:
    """A file of a slow store of which nothing is cached."""

    mount: MountedStore
    name: str

    @property
    def path(self) -> Path:
        return self.mount.path / self.name

    def open(self) -> int:
        """A descriptor: the first one, while nothing else is open, is that of direct reads."""
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    def comes(self) -> bool:
        """Whether it is not wholly here."""
        return bool(self.mount.info(self.name)["residency"]["disk"] < SIZE)

    def resident(self) -> bool:
        """Whether the kernel reads it without the server."""
        return bool(self.mount.info(self.name)["passthrough"])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    (root / "bucket").mkdir()
    return root


@contextmanager
def mounted_at(rate: int, root: Path, directory: Path) -> Iterator[MountedStore]:
    options = ("--cold-open", "stream", "--prefetch", "off", "--metadata-ttl", "0.2")
    with (
        start_fast(root, rate=rate) as server,
        mounted("s3://bucket", directory, *options, environment=server.environment()) as mount,
    ):
        yield mount


@pytest.fixture(scope="module")
def slow(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    with mounted_at(SLOW, root, tmp_path_factory.mktemp("slow")) as mount:
        yield mount


@pytest.fixture(scope="module")
def quick(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedStore]:
    """For tests that only begin while the file is not here."""
    with mounted_at(QUICK, root, tmp_path_factory.mktemp("quick")) as mount:
        yield mount


@pytest.fixture
def cold(request: pytest.FixtureRequest, root: Path) -> Iterator[Cold]:
    """A file of the test's own: weights, by its name, unless a parameter says otherwise."""
    mount: MountedStore = request.getfixturevalue("quick" if "quick" in request.fixturenames else "slow")
    name = f"{uuid.uuid4().hex[:12]}{getattr(request, 'param', '.bin')}"
    (root / "bucket" / name).write_bytes(CONTENT)
    cold = Cold(mount, name)
    wait_until(cold.path.exists)
    yield cold
    wait_until(lambda: trimsfs("evict", cold.path).returncode == 0)
    (root / "bucket" / name).unlink()


@pytest.fixture
def direct(cold: Cold) -> Iterator[int]:
    """The descriptor of the first program that has the file open."""
    descriptor = cold.open()
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def later(direct: int, cold: Cold) -> Iterator[int]:
    """The descriptor of a second program, whose reads have pages."""
    del direct
    descriptor = cold.open()
    assert os.pread(descriptor, MIB, 0) == CONTENT[:MIB]
    assert pages(descriptor) >= MIB
    yield descriptor
    os.close(descriptor)


def pages(descriptor: int) -> int:
    """Bytes of a file in the page cache, by the inode that the descriptor is of."""
    found = resident_bytes(descriptor)
    assert found is not None
    return found


def digest(data: bytes | mmap.mmap) -> str:
    return hashlib.sha256(data).hexdigest()


# The right bytes


@pytest.mark.usefixtures("quick")
def test_reads_of_odd_sizes_are_byte_exact(cold: Cold, direct: int) -> None:
    position, draw = 0, random.Random(1)
    sizes = (1, 7, PAGE - 1, PAGE, PAGE + 1, 131_071, MIB + 1, 3 * MIB)
    while piece := os.read(direct, size := draw.choice(sizes)):
        assert piece == CONTENT[position : position + size]
        position += len(piece)
    assert position == SIZE
    assert pages(direct) == 0
    assert cold.mount.info(cold.name)["open"] == 1


def test_reads_at_odd_offsets_are_byte_exact(cold: Cold, direct: int) -> None:
    draw = random.Random(2)
    assert os.pread(direct, 100, SIZE - 10) == CONTENT[-10:]
    assert os.pread(direct, 100, SIZE) == os.pread(direct, 100, SIZE + 12345) == b""
    assert cold.comes()
    for _ in range(150):
        offset, size = draw.randrange(SIZE), draw.choice([1, PAGE - 1, 100_001, 2 * MIB + 3])
        assert os.pread(direct, size, offset) == CONTENT[offset : offset + size]
    assert pages(direct) == 0


@pytest.mark.usefixtures("quick")
def test_many_threads_read_one_descriptor_at_once(cold: Cold, direct: int) -> None:
    def read(seed: int) -> bool:
        draw = random.Random(seed)
        right = True
        for _ in range(25):
            offset, size = draw.randrange(SIZE), draw.randrange(1, 700_000)
            right &= os.pread(direct, size, offset) == CONTENT[offset : offset + size]
        return right

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(read, range(16)))
    assert pages(direct) == 0


@pytest.mark.parametrize(
    ("flags", "protection"),
    [
        pytest.param(mmap.MAP_SHARED, mmap.PROT_READ, id="shared"),
        pytest.param(mmap.MAP_PRIVATE, mmap.PROT_READ, id="private"),
        pytest.param(mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, id="copy on write"),
        pytest.param(None, None, id="access"),
    ],
)
def test_mappings_of_a_file_that_still_comes_are_byte_exact(
    cold: Cold, direct: int, flags: int | None, protection: int | None
) -> None:
    assert os.pread(direct, 5, 77) == CONTENT[77:82]
    if flags is None or protection is None:
        mapping = mmap.mmap(direct, 0, access=mmap.ACCESS_READ)
    else:
        mapping = mmap.mmap(direct, 0, flags=flags, prot=protection)
    with mapping:
        assert mapping[:100] == CONTENT[:100]
        assert cold.comes()
        assert os.pread(direct, 5 * MIB, 3) == CONTENT[3 : 5 * MIB + 3]
        assert mapping[-100:] == CONTENT[-100:]
        assert mapping[:] == CONTENT
        if protection is not None and protection & mmap.PROT_WRITE:
            mapping[1000:1004] = b"mine"
            assert os.pread(direct, 10, 998) == CONTENT[998:1008]
            assert mapping[998:1006] == CONTENT[998:1000] + b"mine" + CONTENT[1004:1006]
            mapping[1000:1004] = CONTENT[1000:1004]
        wait_until(cold.resident, HERE_S)
        assert mapping[:] == CONTENT


def by_sendfile(source: int, target: int) -> None:
    offset = 0
    while sent := os.sendfile(target, source, offset, MIB + 1):
        offset += sent


def by_splice(source: int, target: int) -> None:
    out, into = os.pipe()
    while count := os.splice(source, into, 1 << 16):
        while count:
            count -= os.splice(out, target, count)
    os.close(out)
    os.close(into)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("copy", [by_sendfile, by_splice])
def test_copies_that_the_kernel_makes_are_byte_exact(
    cold: Cold, direct: int, tmp_path: Path, copy: Callable[[int, int], None]
) -> None:
    assert cold.comes()
    with (tmp_path / "copy").open("wb") as file:
        copy(direct, file.fileno())
    assert (tmp_path / "copy").read_bytes() == CONTENT


# One copy in memory


def test_pages_of_several_who_read_on_are_right_after_they_were_dropped(cold: Cold, direct: int, later: int) -> None:
    assert cold.comes()
    wait_until(cold.resident, HERE_S)
    wait_until(lambda: pages(later) == 0)
    for descriptor in (later, direct):
        assert os.pread(descriptor, SIZE, 0) == CONTENT


MAPPER = """
import hashlib, mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
    print(hashlib.sha256(mapping).hexdigest())
    with open("/proc/self/smaps") as smaps:
        ours = smaps.read().partition(sys.argv[1])[2]
    print(int(ours.partition("\\nPss:")[2].split()[0]) * 1024)
"""
"""A program that maps a file, and tells its digest and how many bytes of the pages are its share."""


def test_who_maps_a_file_later_shares_the_pages_of_who_mapped_it_before_it_was_here(cold: Cold) -> None:
    """The kernel does not move a mapping to the local file: so the others come to it."""
    with cold.path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert mapping[:MIB] == CONTENT[:MIB]
        assert pages(file.fileno()) >= MIB
        assert cold.comes()
        wait_until(cold.resident, HERE_S)
        wait_until(lambda: pages(file.fileno()) == 0)  # they are dropped, ...
        assert mapping[MIB : MIB + 10] == CONTENT[MIB : MIB + 10]
        assert pages(file.fileno()) > 0  # ... and come back
        assert digest(mapping) == digest(CONTENT)
        assert pages(file.fileno()) >= SIZE
        reads = cold.mount.metrics()[READS]
        mapped, share = run(sys.executable, "-c", MAPPER, cold.path, check=True).stdout.split()
        assert mapped == digest(CONTENT)
        assert int(share) <= 0.6 * SIZE
        assert cold.mount.metrics()[READS] == reads
    wait_until(lambda: cold.mount.info(cold.name)["open"] == 0)
    # Who opens the file now reads the pages of the local file, and has none besides.
    (local,) = [path for path in blob_files(cold.mount.cache) if path.stat().st_size == SIZE]
    with (
        cold.path.open("rb") as new,
        local.open("rb") as backing,
        mmap.mmap(new.fileno(), 0, prot=mmap.PROT_READ) as mapping,
    ):
        assert digest(mapping) == digest(CONTENT)
        assert pages(new.fileno()) == 0
        assert pages(backing.fileno()) >= SIZE


@pytest.mark.parametrize("cold", [".db"], indirect=True)
def test_a_file_that_is_not_weights_has_pages_until_it_is_resident(cold: Cold, direct: int) -> None:
    """Programs may read the same small pieces of it again and again."""
    assert os.pread(direct, MIB, 0) == CONTENT[:MIB]
    assert pages(direct) >= MIB
    assert cold.comes()
    wait_until(cold.resident, HERE_S)
    wait_until(lambda: pages(direct) == 0)
    assert os.pread(direct, SIZE, 0) == CONTENT


@pytest.mark.parametrize("cold", [".safetensors", ".gguf", ".params"], indirect=True)
def test_weights_are_known_by_their_names(cold: Cold, direct: int) -> None:
    assert os.pread(direct, 2 * MIB, 0) == CONTENT[: 2 * MIB]
    assert cold.comes()
    assert pages(direct) == 0


# Without its server


def test_direct_reads_go_on_after_the_server_was_killed(cold: Cold, direct: int) -> None:
    assert os.read(direct, MIB + 1) == CONTENT[: MIB + 1]
    with mmap.mmap(direct, 0, prot=mmap.PROT_READ) as mapping:
        assert mapping[3 * MIB : 3 * MIB + 9] == CONTENT[3 * MIB : 3 * MIB + 9]
        assert cold.comes()
        kill(cold.mount)
        assert os.read(direct, MIB) == CONTENT[MIB + 1 : 2 * MIB + 1]
        assert os.pread(direct, SIZE, 0) == CONTENT
        assert mapping[:] == CONTENT
        wait_until(cold.resident, HERE_S)
        kill(cold.mount)
        assert os.pread(direct, SIZE, 0) == CONTENT
        assert mapping[:] == CONTENT


def test_pages_are_dropped_by_the_server_that_follows_a_killed_one(cold: Cold, direct: int, later: int) -> None:
    assert cold.comes()
    kill(cold.mount)
    assert os.pread(direct, SIZE, 0) == CONTENT
    wait_until(cold.resident, HERE_S)
    wait_until(lambda: pages(later) == 0)
    assert os.pread(later, SIZE, 0) == CONTENT


def test_reads_under_way_go_on_when_the_server_is_killed(cold: Cold, direct: int) -> None:
    """Those that wait for bytes: the kernel asks the next server again."""
    with ThreadPoolExecutor(4) as threads:
        offsets = [SIZE - 1000 - number * MIB for number in range(4)]
        answers = [threads.submit(os.pread, direct, 1000, offset) for offset in offsets]
        whole = threads.submit(cold.path.read_bytes)
        kill(cold.mount)
        for offset, answer in zip(offsets, answers, strict=True):
            assert answer.result(60) == CONTENT[offset : offset + 1000]
        assert whole.result(60) == CONTENT
