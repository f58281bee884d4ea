"""A store that does not answer, on real mounts: what is here is used as if it did."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.services import S3Server
from tests.services.fast import start_fast
from tests.services.switch import Switch, switched
from tests.support.mounts import MountedStore, mounted, trimsfs, wait_until

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 100_000}
ABSENT = ("model.safetensors.index.json", "added_tokens.json")
DEADLINE_S = 2
OPTIONS = ("--metadata-ttl", "0.5", "--retry-deadline", str(DEADLINE_S))
OUTAGES = pytest.mark.parametrize("how", ["gone", "hangs"])


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[tuple[S3Server, Switch]]:
    """A server with a model, behind a switch."""
    model = tmp_path / "buckets/bucket/model"
    model.mkdir(parents=True)
    for name, content in FILES.items():
        (model / name).write_bytes(content)
    (tmp_path / "buckets/bucket/unlisted").mkdir()
    (tmp_path / "buckets/bucket/unlisted/x").write_bytes(b"x")
    with start_fast(tmp_path / "buckets") as server, switched(server) as found:
        yield found


@contextmanager
def mounted_at(server: S3Server, directory: Path) -> Iterator[MountedStore]:
    with mounted("s3://bucket", directory / "mount", *OPTIONS, environment=server.environment()) as mount:
        yield mount


def away(switch: Switch, how: str) -> None:
    if how == "gone":
        switch.off()
    else:
        switch.hold()


def load(mount: MountedStore) -> float:
    """Load the model as engines do, which look for files that there are not; the seconds that it takes."""
    model, began = mount.path / "model", time.monotonic()
    for name in ABSENT:
        assert not (model / name).exists()
    assert sorted(os.listdir(model)) == sorted(FILES)
    for name, content in FILES.items():
        assert (model / name).read_bytes() == content
    return time.monotonic() - began


def told(mount: MountedStore) -> tuple[int, str | None]:
    """The exit code of `trimsfs status`, and what it says of the store."""
    done = trimsfs("status", mount.path, "--json")
    return done.returncode, json.loads(done.stdout)[0]["store_problem"]


@OUTAGES
def test_a_model_that_is_here_is_loaded_as_if_the_store_answered(
    endpoint: tuple[S3Server, Switch], how: str, tmp_path: Path
) -> None:
    server, switch = endpoint
    with mounted_at(server, tmp_path) as mount:
        load(mount)
        warm_s = min(load(mount) for _ in range(3))
        assert told(mount) == (0, None)
        away(switch, how)
        time.sleep(1)
        load(mount)  # the first one finds out
        wait_until(lambda: told(mount)[0] == 1)
        assert "trimsfs_store_circuit_open 1.0" in (mount.path / ".trims/metrics").read_text()
        assert min(load(mount) for _ in range(3)) < warm_s + 0.5
        with pytest.raises(OSError, match="Input/output error"):
            (mount.path / "unlisted/other").stat()
        switch.let_go()
        if how == "gone":
            switch.on()
        wait_until(lambda: told(mount) == (0, None))
        new = tmp_path / "buckets/bucket/model" / ABSENT[0]
        new.write_bytes(b"{}")
        wait_until((mount.path / "model" / ABSENT[0]).exists)


@OUTAGES
def test_a_mount_starts_while_its_store_is_away(endpoint: tuple[S3Server, Switch], how: str, tmp_path: Path) -> None:
    server, switch = endpoint
    with mounted_at(server, tmp_path) as mount:
        load(mount)
        time.sleep(1)  # in which what was listed is recorded
    away(switch, how)
    began = time.monotonic()
    with mounted_at(server, tmp_path) as mount:
        assert time.monotonic() - began < 10
        load(mount)
        assert told(mount)[0] == 1
        assert "serving what is cached until the store answers" in mount.log()
        switch.let_go()
        if how == "gone":
            switch.on()
        wait_until(lambda: told(mount) == (0, None))
        new = tmp_path / "buckets/bucket/new"
        new.write_bytes(b"uploaded")
        wait_until(lambda: (mount.path / "new").read_bytes() == b"uploaded", tolerate=OSError)
