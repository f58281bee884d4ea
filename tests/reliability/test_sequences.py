"""Random sequences of reads and mappings, after fsx: by a seed, each compared with the bytes that are to be there."""

import contextlib
import ctypes
import mmap
import os
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.reliability.syscalls import checked, libc
from tests.support.mounts import MountedStore, mounted, trimsfs
from tests.support.survival import Survived

MIB = 1 << 20
PAGE = mmap.PAGESIZE
SIZES = (1, PAGE - 1, PAGE, PAGE + 1, 300_000, 8 * MIB, 20 * MIB + 17)
"""Of files; more than a chunk, and at the bounds of pages."""
ADVICE = [mmap.MADV_NORMAL, mmap.MADV_RANDOM, mmap.MADV_SEQUENTIAL, mmap.MADV_WILLNEED, mmap.MADV_DONTNEED, 20, 21, 22]
"""Those that keep the content; 20 to 22 are COLD, PAGEOUT and POPULATE_READ."""


class Sequence:
    """Operations on one file that is open several times, drawn by a seed."""

    def __init__(self, path: Path, content: bytes, seed: str) -> None:
        self._path, self._content = path, content
        self._draw = random.Random(seed)
        self._files = [self._opened() for _ in range(3)]
        self._positions = [0] * len(self._files)
        self._mappings: list[mmap.mmap] = []
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._operations: list[Callable[[], None]] = [
            *([self._read, self._pread, self._preadv, self._touch] * 3),
            *(self._seek, self._direct, self._map, self._unmap, self._advise, self._ahead, self._reopen, self._send),
            *(self._copy_on_write, self._populate, self._stat),
        ]

    def run(self, count: int) -> None:
        for _ in range(count):
            operation = self._draw.choice(self._operations)
            self.counts[operation.__name__.strip("_")] += 1
            operation()
        while self._mappings:
            self._mappings.pop().close()
        for file in self._files:
            os.close(file)

    def _opened(self) -> int:
        return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def _compare(self, found: bytes, offset: int, size: int, what: str) -> None:
        if found != self._content[offset : offset + size]:
            self.wrong.append(f"{what} of {size} bytes at {offset} of {self._path.name}: {len(found)} bytes")

    def _place(self) -> tuple[int, int]:
        """An offset, perhaps behind the end, and a size."""
        end = len(self._content)
        offset = self._draw.choice([0, self._draw.randrange(end), max(0, end - self._draw.randrange(1, 2 * PAGE)), end])
        return offset + self._draw.choice([0, 0, 0, 1, PAGE]), self._draw.choice([1, 100, PAGE, 70_000, MIB])

    def _read(self) -> None:
        index, (_, size) = self._draw.randrange(len(self._files)), self._place()
        found = os.read(self._files[index], size)
        self._compare(found, self._positions[index], size, "read")
        self._positions[index] += len(found)

    def _seek(self) -> None:
        index, (offset, _) = self._draw.randrange(len(self._files)), self._place()
        self._positions[index] = os.lseek(self._files[index], offset, os.SEEK_SET)

    def _pread(self) -> None:
        offset, size = self._place()
        self._compare(os.pread(self._draw.choice(self._files), size, offset), offset, size, "pread")

    def _preadv(self) -> None:
        offset, _ = self._place()
        sizes = [self._draw.choice([1, 0, 77, PAGE, 5000]) for _ in range(4)]
        buffers = [bytearray(size) for size in sizes]
        count = os.preadv(self._draw.choice(self._files), buffers, offset)
        self._compare(b"".join(buffers)[:count], offset, sum(sizes), "preadv")

    def _direct(self) -> None:
        offset = self._place()[0] // PAGE * PAGE
        room = ctypes.create_string_buffer(65 * PAGE)
        address = (ctypes.addressof(room) + PAGE - 1) // PAGE * PAGE
        file = os.open(self._path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
        try:
            count = checked(libc.pread(file, ctypes.c_void_p(address), 64 * PAGE, ctypes.c_long(offset)))
        finally:
            os.close(file)
        self._compare(ctypes.string_at(address, count), offset, 64 * PAGE, "direct")

    def _map(self) -> None:
        offset = self._draw.randrange(len(self._content)) // PAGE * PAGE
        length = self._draw.randrange(1, len(self._content) - offset + 1)
        if len(self._mappings) > 5:
            self._unmap()
        self._mappings.append(mmap.mmap(self._files[0], offset + length, prot=mmap.PROT_READ))

    def _unmap(self) -> None:
        if self._mappings:
            self._mappings.pop(self._draw.randrange(len(self._mappings))).close()

    def _touch(self) -> None:
        if not self._mappings:
            self._map()
        mapping = self._draw.choice(self._mappings)
        offset = self._draw.randrange(len(mapping))
        size = min(self._draw.choice([1, PAGE, 70_000]), len(mapping) - offset)
        self._compare(mapping[offset : offset + size], offset, size, "touch")

    def _advise(self) -> None:
        if not self._mappings:
            self._map()
        mapping = self._draw.choice(self._mappings)
        with contextlib.suppress(OSError):  # an advice that the kernel does not know
            mapping.madvise(self._draw.choice(ADVICE))
        self._touch()

    def _ahead(self) -> None:
        offset, size = self._place()
        file = self._draw.choice(self._files)
        os.posix_fadvise(file, offset, size, self._draw.randrange(6))
        checked(libc.readahead(file, ctypes.c_long(offset), ctypes.c_size_t(size)))

    def _reopen(self) -> None:
        index = self._draw.randrange(1, len(self._files))
        os.close(self._files[index])
        self._files[index], self._positions[index] = self._opened(), 0

    def _send(self) -> None:
        offset, size = self._place()
        receiver, sender = os.pipe()
        count = os.sendfile(sender, self._draw.choice(self._files), offset, min(size, 16 * PAGE))
        os.close(sender)
        with os.fdopen(receiver, "rb") as file:
            self._compare(file.read(), offset, count, "sendfile")
        if offset < len(self._content):
            self._compare(b"", offset, 0 if count else size, "sendfile")

    def _copy_on_write(self) -> None:
        with mmap.mmap(self._files[0], len(self._content), access=mmap.ACCESS_COPY) as mapping:
            offset = self._draw.randrange(len(mapping))
            mapping[offset] = self._content[offset] ^ 0xFF
            beside = offset // PAGE * PAGE
            self._compare(mapping[beside:offset], beside, offset - beside, "copy on write")
        self._compare(os.pread(self._files[0], 1, offset), offset, 1, "what was copied")

    def _populate(self) -> None:
        length = self._draw.randrange(1, len(self._content) + 1)
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        with mmap.mmap(self._files[0], length, flags=flags, prot=mmap.PROT_READ) as mapping:
            self._compare(mapping[-PAGE:], max(0, length - PAGE), min(PAGE, length), "populate")

    def _stat(self) -> None:
        sizes = {os.fstat(self._draw.choice(self._files)).st_size, os.stat(self._path).st_size}
        if sizes != {len(self._content)}:
            self.wrong.append(f"sizes {sizes} of {self._path.name}")


def perform(mount: MountedStore, contents: dict[str, bytes], seed: str, count: int) -> tuple[Counter[str], list[str]]:
    """One sequence for each file, at once; what was done, and what was wrong."""

    def one(name: str) -> Sequence:
        sequence = Sequence(mount.path / name, contents[name], f"{seed}-{name}")
        sequence.run(count)
        return sequence

    with ThreadPoolExecutor(len(contents)) as threads:
        sequences = list(threads.map(one, contents))
    return sum((one.counts for one in sequences), Counter()), [wrong for one in sequences for wrong in one.wrong]


def check(store: Path, survived: Survived, rounds: int, count: int, *options: str) -> None:
    """Sequences on files that are cold, warm, and evicted again."""
    contents = {str(size): random.Random(size).randbytes(size) for size in SIZES}
    for name, content in contents.items():
        (store / name).write_bytes(content)
    total, wrong = Counter[str](), list[str]()
    with mounted(store, store.parent, *options) as mount:
        for number in range(rounds):
            done, bad = perform(mount, contents, f"{options}-{number}", count)
            total, wrong = total + done, wrong + bad
            if number % 3 == 1:
                assert trimsfs("evict", mount.path).returncode == 0
    assert wrong == []
    assert len(total) == 15
    survived(
        f"sequences of reads and mappings, {' '.join(options)}",
        injected=rounds * len(SIZES),
        operations=total.total(),
        wrong=len(wrong),
    )


@pytest.mark.parametrize("mode", ["passthrough=yes", "passthrough=no"])
def test_random_sequences_of_reads_and_mappings_are_exact(mode: str, store_directory: Path, survived: Survived) -> None:
    check(store_directory, survived, 2, 60, mode)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("passthrough=yes",),
        ("passthrough=no",),
        ("--cold-open", "stream"),
        ("--cache-size", "16MiB"),
        ("--cache-size", "0"),
    ],
    ids=" ".join,
)
def test_long_sequences_of_reads_and_mappings_are_exact(
    options: tuple[str, ...], store_directory: Path, survived: Survived
) -> None:
    check(store_directory, survived, 9, 500, *options)
