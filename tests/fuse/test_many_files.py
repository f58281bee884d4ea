"""Many small files, with few descriptors for the server: what is here stays a round trip away."""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services.fast import FastS3, start_fast
from tests.support.mounts import MountedStore, mounted, wait_until

COUNT = 300
LIMIT = 128
"""Descriptors, of which the server leaves half for other things than files."""


def content(number: int) -> bytes:
    return b"%d\n" % number * 300


@dataclass(frozen=True, slots=True)
class Many:
    """COUNT files in a mount, all of which have been read."""

    mount: MountedStore
    store: FastS3

    def path(self, number: int) -> Path:
        return self.mount.path / f"parts/{number:04}"

    def read(self) -> None:
        """Read all, one after the other."""
        for number in range(COUNT):
            assert self.path(number).read_bytes() == content(number)

    def requests(self) -> tuple[int, set[str]]:
        """Listings since the last time, and the objects that were asked for."""
        traffic = self.store.statistics()
        self.store.reset()
        listings = sum(counted.requests for name, counted in traffic.items() if name.endswith("?list"))
        return listings, {name for name in traffic if not name.endswith("?list")}

    def opens(self) -> tuple[float, float, float]:
        """Opens that were passed through, others, and reads that the server answered, since it was started."""
        metrics = self.mount.metrics()
        return (
            metrics["trimsfs_files_passthrough_opens_total"],
            metrics["trimsfs_files_cached_opens_total"],
            metrics["trimsfs_files_reads_total"],
        )

    def descriptors(self) -> int:
        """Descriptors of the server."""
        return len(os.listdir(f"/proc/{self.mount.control()['server_pid']}/fd"))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    directory = tmp_path_factory.mktemp("many")
    parts = directory / "store/bucket/parts"
    parts.mkdir(parents=True)
    for number in range(COUNT):
        (parts / f"{number:04}").write_bytes(content(number))
    environment = {"AWS_ACCESS_KEY_ID": "fast", "AWS_SECRET_ACCESS_KEY": "fast"}
    with (
        start_fast(directory / "store") as store,
        mounted(
            "s3://bucket",
            directory / "mount",
            *("--endpoint-url", store.endpoint_url, "--region", "us-east-1", "--metadata-ttl", "3600"),
            environment=environment,
            before=("prlimit", f"--nofile={LIMIT}:{LIMIT}"),
        ) as mount,
    ):
        many = Many(mount, store)
        with ThreadPoolExecutor(8) as pool:
            found = pool.map(lambda number: many.path(number).read_bytes(), range(COUNT))
            assert list(found) == [content(number) for number in range(COUNT)]
        many.read()  # what could not be kept while all were fetched at once is fetched now
        wait_until(lambda: mount.metrics()["trimsfs_files_open_handles"] == 0)
        yield many


def test_each_warm_open_is_one_round_trip_however_few_descriptors_there_are(many: Many) -> None:
    many.requests()
    before = many.opens()
    for _ in range(2):
        many.read()
    passed, cached, reads = (after - earlier for after, earlier in zip(many.opens(), before, strict=True))
    assert (passed, cached, reads) == (2 * COUNT, 0, 0)
    assert many.requests() == (0, set())
    assert many.descriptors() < LIMIT


def test_more_files_are_open_at_once_than_there_are_descriptors(many: Many) -> None:
    many.requests()
    before = many.opens()
    with ExitStack() as held:
        files = [held.enter_context(many.path(number).open("rb", buffering=0)) for number in range(COUNT)]
        for number, file in enumerate(files):
            assert file.read() == content(number)
    passed, cached, reads = (after - earlier for after, earlier in zip(many.opens(), before, strict=True))
    assert (passed, cached, reads) == (COUNT, 0, 0)
    assert many.requests() == (0, set())


@pytest.mark.parametrize(("first", "removed"), [(0, False), (10, True)])
def test_what_happens_to_a_file_that_the_server_has_closed_is_noticed(many: Many, first: int, removed: bool) -> None:
    many.requests()
    numbers = range(first, first + 3)
    files = {path.read_bytes(): path for path in many.mount.cache.glob("blobs/*/*")}
    assert len(files) == COUNT
    for number in numbers:
        blob = files[content(number)]
        if removed:
            blob.unlink()
        else:
            os.truncate(blob, 10)
    many.read()
    metrics = many.mount.metrics()
    many.read()
    assert many.mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == metrics["trimsfs_fetch_fetched_bytes_total"]
    listings, objects = many.requests()
    assert objects == {f"bucket/parts/{number:04}" for number in numbers}
    # Two more ask whether the directory has versions by now.
    assert listings <= 2 * len(numbers) + 2, "no more than to ask whether they are still what they were"
    assert sorted(path.read_bytes() for path in many.mount.cache.glob("blobs/*/*")) == sorted(files)


def test_the_next_server_goes_on_with_what_the_kernel_reads(many: Many) -> None:
    """The last test, as a server that follows another asks for names anew."""
    many.requests()
    with many.path(5).open("rb", buffering=0) as file:
        os.kill(many.mount.control()["server_pid"], signal.SIGKILL)
        many.read()
        assert file.read() == content(5)
    many.read()
    listings, objects = many.requests()
    assert len(objects) <= 2, "a name or two before the directory is listed"
    assert listings <= 4
    assert many.opens()[1:] == (0, 0)
    assert many.descriptors() < LIMIT
