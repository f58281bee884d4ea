"""Hosts whose mounts ask a cache, which asks the store: nginx, by the configuration that is packaged.

A mount with a cache directory of its own stands for a host. The store is an emulation that counts what it sends.
"""

import errno
import random
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import pytest

from tests.services.buckets import uploaded
from tests.services.caching_proxy import start_caching_proxy
from tests.services.fast import FastS3, start_fast
from tests.support.mounts import MountedStore, let_in, mounted, trimsfs
from trimsfs.types import CHUNK_SIZE

BUCKET, NAME = "models", "model.safetensors"
SIZE = 3 * CHUNK_SIZE + 12345
HEAD_SHARE = 0.02
"""Of an object, what each host asks the store for: its head, as its ETag is not known yet."""
HALF = CHUNK_SIZE // 2
BY_RANGE_ALONE = {'"" $slice_range': '"" $http_range', "$request_uri $http_if_match $asked": "$request_uri $asked"}
"""A cache that passes ranges on as they are asked, and gives what it has of one, whatever ETag is asked for."""
SMALL = 1 << 20
"""An object that all hosts ask for by the same range."""


@dataclass(frozen=True)
class Place:
    """A store, a cache in front of it, and mounts that know only the cache."""

    directory: Path
    server: FastS3
    cache_url: str

    def put(self, seed: str, size: int = SIZE) -> bytes:
        """Store the object, or replace it; its content."""
        content, fresh = random.Random(seed).randbytes(size), self.directory / "fresh"
        fresh.write_bytes(content)
        uploaded(fresh)
        fresh.rename(self.directory / "buckets" / BUCKET / NAME)
        return content

    @contextmanager
    def host(self, *options: str) -> Iterator[MountedStore]:
        """The mount of a host that has nothing yet."""
        directory = self.directory / f"host{len(list(self.directory.glob('host*.log')))}"
        endpoint = ("--endpoint-url", self.cache_url, "--anonymous")
        with mounted(f"s3://{BUCKET}", directory, *endpoint, *options, environment={"NO_PROXY": "*"}) as mount:
            yield mount

    def sent_bytes(self) -> int:
        """What the store has sent of the object so far."""
        return self.server.statistics()[f"{BUCKET}/{NAME}"].body_bytes

    def etag(self) -> str:
        """The object's, by the store."""
        with closing(self.server.client()) as client:
            return client.head_object(Bucket=BUCKET, Key=NAME)["ETag"]

    def half_chunk(self, number: int, etag: str) -> bytes | int:
        """What the cache gives of half a chunk for this ETag; or the status of its refusal."""
        return self.part(number * HALF, HALF, etag)

    def part(self, start: int, size: int, etag: str) -> bytes | int:
        """What the cache gives of some bytes for this ETag; or the status of its refusal."""
        return self.asked({"If-Match": etag, "Range": f"bytes={start}-{start + size - 1}"})

    def asked(self, headers: dict[str, str]) -> bytes | int:
        """What the cache gives for these headers; or the status of its refusal."""
        request = urllib.request.Request(f"{self.cache_url}/{BUCKET}/{NAME}", headers=headers)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
                content: bytes = answer.read()
                return content
        except urllib.error.HTTPError as error:
            with error:
                return error.code


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """Starts a store and a cache whose configuration has some *changes*."""
    let_in(tmp_path)
    (tmp_path / "buckets" / BUCKET).mkdir(parents=True)
    with ExitStack() as stack:

        def started(changes: Mapping[str, str] | None = None) -> Place:
            server = stack.enter_context(start_fast(tmp_path / "buckets"))
            return Place(
                tmp_path, server, stack.enter_context(start_caching_proxy(server.endpoint_url, changes=changes))
            )

        yield started


def read(path: Path) -> bytes | int | None:
    """A file's bytes, or the number of the error."""
    try:
        return path.read_bytes()
    except OSError as error:
        return error.errno


def test_a_second_host_gets_its_bytes_from_the_cache(start: Callable[[], Place]) -> None:
    place = start()
    model = place.put("model")
    with place.host() as first, place.host() as second:
        assert (first.path / NAME).read_bytes() == model
        before = place.sent_bytes()
        assert SIZE <= before < SIZE * (1 + HEAD_SHARE)
        assert (second.path / NAME).read_bytes() == model
        assert place.sent_bytes() - before < SIZE * HEAD_SHARE


@pytest.mark.parametrize(
    ("cached", "missing", "told"),
    [
        pytest.param((0, 1, 4, 5), 2, errno.ESTALE, id="whole chunks"),
        pytest.param((0, 1, 2), 3, errno.EIO, id="a part of a chunk"),  # whose rest never comes, whatever is retried
    ],
)
def test_a_replaced_object_is_not_mixed_with_what_the_cache_has_of_the_old_one(
    start: Callable[[], Place], cached: tuple[int, ...], missing: int, told: int
) -> None:
    place = start()
    old = place.put("old")
    etag = place.etag()
    with place.host("--metadata-ttl", "600", "--retry-deadline", "1") as mount:
        assert (mount.path / NAME).stat().st_size == SIZE
        for half in cached:
            place.half_chunk(half, etag)
        new = place.put("new")
        for half in cached:  # so that this mount could mix
            assert place.half_chunk(half, etag) == old[half * HALF :][:HALF]
        assert place.half_chunk(missing, etag) == HTTPStatus.PRECONDITION_FAILED
        assert read(mount.path / NAME) in (new, told)
        assert trimsfs("refresh", mount.path / NAME).returncode == 0
        assert read(mount.path / NAME) == new


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"If-Match": "*"}, id="of any content"),
        pytest.param({"If-Match": "{etag}", "Authorization": "of its user"}, id="with credentials"),
        pytest.param({}, id="of no content"),
    ],
)
def test_what_is_not_for_everybody_or_of_any_content_is_not_kept(
    start: Callable[[], Place], headers: dict[str, str]
) -> None:
    place = start()
    model = place.put("model")
    assert isinstance(place.part(0, HALF, place.etag()), bytes)
    for _ in range(2):
        before = place.sent_bytes()
        named = {name: value.format(etag=place.etag()) for name, value in headers.items()}
        content = place.asked({"Range": f"bytes=0-{HALF - 1}", **named})
        assert isinstance(content, bytes)
        assert model.startswith(content)
        assert place.sent_bytes() - before == len(content)


def test_a_cache_that_does_not_tell_generations_apart_gives_no_wrong_byte(
    start: Callable[[Mapping[str, str]], Place],
) -> None:
    place = start(BY_RANGE_ALONE)
    old = place.put("old", SMALL)
    with place.host() as first:
        assert (first.path / NAME).read_bytes() == old
    new = place.put("new", SMALL)
    assert place.part(0, SMALL, place.etag()) == old  # the cache is as bad as it should be
    with place.host("--metadata-ttl", "0") as second:
        found = [read(second.path / NAME) for _ in range(3)]
    assert new != old
    assert found == [errno.ESTALE] * len(found)
