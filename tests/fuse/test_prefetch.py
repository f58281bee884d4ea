"""What comes before it is asked for, on real mounts of a bucket."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.fast import FastS3, start_fast
from tests.support.keepers import kill
from tests.support.mounts import MountedStore, mounted, trimsfs, wait_until
from tests.support.parts import recorded_loads

MIB = 1 << 20
SHARDS = [f"model-{number:05}-of-00010.safetensors" for number in range(1, 11)]
UNNUMBERED = ["d", "b", "e", "a"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A bucket with a model in ten shards and an index, and one without either."""
    root = tmp_path / "store"
    (root / "bucket/sharded").mkdir(parents=True)
    (root / "bucket/plain").mkdir()
    for number, name in enumerate(SHARDS):
        (root / "bucket/sharded" / name).write_bytes(random.Random(number).randbytes(2 * MIB))
    index = {"weight_map": {f"layer.{number}": name for number, name in enumerate(SHARDS)}}
    (root / "bucket/sharded/model.safetensors.index.json").write_text(json.dumps(index))
    for name in [*UNNUMBERED, "unused"]:
        (root / "bucket/plain" / name).write_bytes(random.Random(name).randbytes(2 * MIB))
    return root


@pytest.fixture
def server(root: Path) -> Iterator[FastS3]:
    with start_fast(root) as server:
        yield server


def fetched(server: FastS3, directory: str) -> set[str]:
    """The names of the files of a directory of which bytes were sent."""
    prefix = f"bucket/{directory}/"
    return {
        name.removeprefix(prefix)
        for name, traffic in server.statistics().items()
        if name.startswith(prefix) and traffic.body_bytes
    }


def coming(mount: MountedStore) -> float:
    """How many files are coming that nobody has asked for."""
    return mount.metrics()["trimsfs_prefetch_coming_files"]


def test_shards_come_ahead_and_each_once(server: FastS3, root: Path, tmp_path: Path) -> None:
    with mounted("s3://bucket", tmp_path / "mount", environment=server.environment()) as mount:
        directory = mount.path / "sharded"
        json.loads((directory / "model.safetensors.index.json").read_text())
        for name in SHARDS:
            wait_until(lambda: name in fetched(server, "sharded") and not coming(mount))  # noqa: B023
            assert (directory / name).read_bytes() == (root / "bucket/sharded" / name).read_bytes()
        sent = {name: server.statistics()[f"bucket/sharded/{name}"].body_bytes for name in SHARDS}
        assert sent == dict.fromkeys(SHARDS, 2 * MIB)
        metrics = mount.metrics()
        assert metrics["trimsfs_prefetch_wasted_files_total"] == 0
        assert metrics["trimsfs_prefetch_used_files_total"] == len(SHARDS)


def test_the_last_load_is_replayed_by_a_server_that_follows_a_killed_one(server: FastS3, tmp_path: Path) -> None:
    with mounted("s3://bucket", tmp_path / "mount", environment=server.environment()) as mount:
        for name in UNNUMBERED:
            (mount.path / "plain" / name).read_bytes()
        wait_until(lambda: recorded_loads(mount.cache) == [UNNUMBERED], timeout_s=20)
        kill(mount)
        assert trimsfs("evict", mount.path / "plain").returncode == 0
        server.reset()
        with (mount.path / "plain" / UNNUMBERED[0]).open("rb"):
            wait_until(lambda: fetched(server, "plain") == {*UNNUMBERED[:3]})
        (mount.path / "plain" / UNNUMBERED[1]).read_bytes()
        wait_until(lambda: fetched(server, "plain") == {*UNNUMBERED})
