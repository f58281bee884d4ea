"""The publisher's commands, on a store that is mounted meanwhile."""

import contextlib
import json
import os
import random
import subprocess
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contract.backends import needs_ceph, shared_bucket
from tests.services import S3Server
from tests.services.ceph import Ceph
from tests.support.mounts import MountedStore, let_in, mounted, trimsfs, wait_until
from tests.versions.proxy import proxy_of

SHARDS = 12
SHARD = 4096
BY_NAME_S = 5.0
"""How long a new version may take to appear by name."""
IN_LISTINGS_S = 2.0
"""How long it may take in `ls`: the mount's --metadata-ttl."""
SEEN_S = 1.0
"""How long after an alias has moved a new process may still see its last target."""
REQUEST_S = 0.03
"""What each request of a push takes here, so that readers look while it goes on."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Store:
    """A store that is mounted, and how the publisher reaches it."""

    url: str
    mount: MountedStore
    environment: Mapping[str, str]

    def publish(self, *arguments: str | Path) -> str:
        """What a command of the publisher's prints."""
        done = trimsfs(*arguments, environment=self.environment)
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def in_a_directory(directory: Path) -> Iterator[Store]:
    store = directory / "store"
    store.mkdir()
    let_in(store)
    (store / "readme").write_text("models")
    with mounted(store, directory, "--metadata-ttl", str(IN_LISTINGS_S)) as mount:
        yield Store(str(store), mount, {})


@contextmanager
def in_a_bucket(server: S3Server, directory: Path) -> Iterator[Store]:
    prefix = uuid.uuid4().hex
    with contextlib.closing(server.client()) as client, proxy_of(server) as proxy:
        bucket = shared_bucket(client)
        client.put_object(Bucket=bucket, Key=f"{prefix}/readme", Body=b"models")
        proxy.before = lambda _: time.sleep(REQUEST_S) or False  # type: ignore[func-returns-value]
        url = f"s3://{bucket}/{prefix}"
        path = ("--addressing-style", "path")
        with mounted(
            url, directory, "--metadata-ttl", str(IN_LISTINGS_S), *path, environment=server.environment()
        ) as mount:
            yield Store(url, mount, {**proxy.server.environment(), "TRIMSFS_ADDRESSING_STYLE": "path"})


@pytest.fixture(params=["directory", pytest.param("seaweed", marks=pytest.mark.slow)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "directory":
        with in_a_directory(tmp_path) as store:
            yield store
    else:
        with in_a_bucket(request.getfixturevalue("seaweed"), tmp_path) as store:
            yield store


def model(directory: Path, version: str) -> Path:
    """A directory to push: shards full of the last character of the version's name."""
    files = directory / version
    files.mkdir()
    for number in range(SHARDS):
        (files / f"shard-{number:02}").write_bytes(version[-1].encode() * SHARD)
    return files


def seen(directory: Path) -> Counter[str]:
    """How many shards of a version a reader gets, by what is in them; it opens the last first."""
    found = Counter[str]()
    for number in reversed(range(SHARDS)):
        try:
            found[(directory / f"shard-{number:02}").read_bytes().decode()[:1]] += 1
        except FileNotFoundError:
            found["missing"] += 1
    return found


def target(alias: Path) -> str:
    """What a new process reads through an alias."""
    return subprocess.run(
        ["head", "-c1", alias / "shard-00"], capture_output=True, text=True, timeout=60, check=False
    ).stdout


def test_a_version_pushed_while_its_store_is_mounted_appears_whole_and_in_time(store: Store, tmp_path: Path) -> None:
    store.publish("push", model(tmp_path, "v1"), f"{store.url}/m:v1")
    store.publish("alias", f"{store.url}/m", "prod", "v1")
    here = store.mount.path / "m"
    wait_until(lambda: target(here / "prod") == "1", timeout_s=BY_NAME_S)
    ended, looks = threading.Event(), list[Counter[str]]()

    def look() -> None:
        while not ended.is_set():
            looks.append(seen(here / "v2"))
            time.sleep(0.01)

    reader = threading.Thread(target=look)
    reader.start()
    try:
        store.publish("push", model(tmp_path, "v2"), f"{store.url}/m:v2")
        during = len(looks)
        wait_until(lambda: seen(here / "v2") == {"2": SHARDS}, timeout_s=BY_NAME_S)
        assert target(here / "prod") == "1", "an alias moves by itself only"
        store.publish("alias", f"{store.url}/m", "prod", "v2")
        time.sleep(SEEN_S)
        assert target(here / "prod") == "2"
        wait_until(lambda: "v2" in os.listdir(here), timeout_s=IN_LISTINGS_S + BY_NAME_S)
        store.publish("rollback", f"{store.url}/m", "prod")
        time.sleep(SEEN_S)
        assert target(here / "prod") == "1"
    finally:
        ended.set()
        reader.join()
    print(f"{during} looks during the push, {len(looks)} in all")
    # The version may appear in the middle of a look, which goes from the last shard to the first.
    partly = [each for each in looks if each not in ({"missing": SHARDS}, {"2": SHARDS})]
    assert len(partly) <= 1, partly
    assert during >= 3, "nobody looked meanwhile"
    assert looks[0] == {"missing": SHARDS}
    assert looks[-1] == {"2": SHARDS}


@needs_ceph
def test_with_share_chunks_a_host_fetches_what_diff_says(ceph: Ceph, bucket: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    weights = random.Random(5).randbytes(40 * MIB + 100)
    head = random.Random(6).randbytes(3 * MIB)
    for directory, files in (
        (first, {"config.json": b"{}", "model.bin": weights, "vocab.bin": head}),
        (second, {"config.json": b"[]", "model.bin": weights[: 17 * MIB] + b"tuned" + weights[17 * MIB + 5 :]}),
    ):
        directory.mkdir()
        for name, content in files.items():
            (directory / name).write_bytes(content)
    (second / "renamed.bin").write_bytes(head)
    environment = ceph.environment()
    name = f"s3://{bucket}/m"
    for version, directory in (("v1", first), ("v2", second)):
        done = trimsfs("push", directory, f"{name}:{version}", environment=environment)
        assert done.returncode == 0, done.stderr
    told = json.loads(trimsfs("diff", "--json", f"{name}:v1", f"{name}:v2", environment=environment).stdout)
    assert told["missing_bytes"] == len(b"[]") + 8 * MIB
    with mounted(f"s3://{bucket}", tmp_path / "host", "--share-chunks", environment=environment) as mount:
        for path in first.iterdir():
            assert (mount.path / "m/v1" / path.name).read_bytes() == path.read_bytes()
        assert trimsfs("verify", mount.path / "m/v1").returncode == 0  # at once, and not when it is at rest
        assert all(mount.info(f"m/v1/{path.name}")["verified"] for path in first.iterdir())
        for path in second.iterdir():
            assert (mount.path / "m/v2" / path.name).read_bytes() == path.read_bytes()
        sent = sum(ceph.bytes_sent(bucket, f"m/v2/{path.name}")[1] for path in second.iterdir())
        assert sent == told["missing_bytes"]
        copied = mount.metrics()["trimsfs_fetch_copied_bytes_total"]
        assert copied == sum(path.stat().st_size for path in second.iterdir()) - sent
