"""Several stores in one mount, each below a path of its own: two directories and a bucket."""

import errno
import json
import os
import socket
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from tests.services import S3Server, put
from tests.support import mounts
from tests.support.keepers import kill
from tests.support.mounts import MountedStore, let_in, mounted, trimsfs, wait_until

BUCKET = "several"
MODEL, OTHER, OBJECT = os.urandom(9 << 20), os.urandom(3 << 20), os.urandom(5 << 20)


@pytest.fixture
def stores(tmp_path: Path) -> dict[str, Path]:
    """Directories by path."""
    found = {"one": tmp_path / "of-one", "hub/other": tmp_path / "of-other"}
    for directory, content in zip(found.values(), (MODEL, OTHER), strict=True):
        directory.mkdir()
        (directory / "model").write_bytes(content)
        let_in(directory)
    return found


def configuration(file: Path, stores: Mapping[str, Path | str]) -> Path:
    """A file that names the stores; URLs have the rest of their table behind them."""
    tables = [f'[[store]]\npath = "{path}"\nstore = "{url}"\n' for path, url in stores.items()]
    file.write_text("\n".join(tables))
    return file


def free_address() -> str:
    """An address at which nothing listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def fetched(mount: MountedStore) -> float:
    return mount.metrics()["trimsfs_fetch_fetched_bytes_total"]


def test_stores_of_different_kinds_are_below_their_paths(
    stores: dict[str, Path], tmp_path: Path, moto: S3Server
) -> None:
    with closing(moto.client()) as client:
        client.create_bucket(Bucket=BUCKET)
    put(moto, BUCKET, {"deep/object": OBJECT})
    bucket = f's3://{BUCKET}"\nendpoint_url = "{moto.endpoint_url}"\naddressing_style = "path'
    file = configuration(tmp_path / "models.toml", {**stores, "bucket": bucket})
    with mounted(None, tmp_path / "mount", "--config", file, environment=moto.environment()) as mount:
        assert sorted(os.listdir(mount.path)) == ["bucket", "hub", "one"]
        assert os.listdir(mount.path / "hub") == ["other"]
        assert (mount.path / "one/model").read_bytes() == MODEL
        assert (mount.path / "hub/other/model").read_bytes() == OTHER
        assert (mount.path / "bucket/deep/object").read_bytes() == OBJECT
        status = trimsfs("status", mount.path)
        assert status.returncode == 0, status.stdout
        assert status.stdout.startswith(f"{mount.path}: several stores\n")
        assert f"/bucket: s3://{BUCKET}: " in status.stdout
        assert f"/hub/other: {stores['hub/other']}: " in status.stdout
        kill(mount)
        assert (mount.path / "one/model").read_bytes() == MODEL
        assert fetched(mount) == 0, "the next server calls the contents as the last one did"


def test_a_mount_comes_up_without_a_store_that_is_away(stores: dict[str, Path], tmp_path: Path) -> None:
    away = (
        f's3://away"\nendpoint_url = "{free_address()}"\nanonymous = true\nretry_deadline = 1\naddressing_style = "path'
    )
    file = configuration(tmp_path / "models.toml", {**stores, "away": away})
    with mounted(None, tmp_path / "mount", "--config", file) as mount:
        assert sorted(os.listdir(mount.path)) == ["away", "hub", "one"]
        assert (mount.path / "one/model").read_bytes() == MODEL
        with pytest.raises(OSError, match="model") as raised:
            (mount.path / "away/model").read_bytes()
        assert raised.value.errno == errno.EIO
        wait_until(lambda: trimsfs("status", mount.path).returncode == 1, timeout_s=20)
        told = trimsfs("status", mount.path).stdout
        assert "/away: s3://away: does not answer, serving from the cache: " in told
        assert f"/one: {stores['one']}: does not answer" not in told
        assert "serving what is cached until the store answers: s3://away: " in mount.log()
        assert (mount.path / "hub/other/model").read_bytes() == OTHER


def test_a_mount_of_which_no_store_answers_fails(tmp_path: Path) -> None:
    tables = f's3://away"\nendpoint_url = "{free_address()}"\nanonymous = true\nretry_deadline = 1\nregion = "x'
    file = configuration(tmp_path / "models.toml", {"one": tables, "other": tables})

    done = trimsfs("mount", tmp_path / "mount", "--config", file, "--cache-dir", tmp_path / "cache")

    assert done.returncode == 7, done.stderr
    assert "s3://away" in done.stderr


def test_a_store_that_does_not_exist_is_a_mistake_that_the_mount_tells(stores: dict[str, Path], tmp_path: Path) -> None:
    file = configuration(tmp_path / "models.toml", {**stores, "typo": tmp_path / "missing"})

    done = trimsfs("mount", tmp_path / "mount", "--config", file, "--cache-dir", tmp_path / "cache")

    assert done.returncode == 5, done.stderr
    assert str(tmp_path / "missing") in done.stderr


def test_a_store_is_added_while_the_mount_is_in_use(stores: dict[str, Path], tmp_path: Path) -> None:
    declared, mountpoint = tmp_path / "mounts.d", tmp_path / "models"
    declared.mkdir()
    places = f'mountpoint = "{mountpoint}"\ncache_dir = "{tmp_path}/cache"\nlog_file = "{tmp_path}/log"\n'
    mountctl = partial(mounts.mountctl, environment={"TRIMSFS_MOUNTS_DIR": str(declared)})

    def declare(stores: Mapping[str, Path]) -> None:
        file = configuration(declared / "models.toml", stores)
        file.write_text(places + file.read_text())

    declare({"one": stores["one"]})
    try:
        done = mountctl("up")
        assert done.returncode == 0, done.stderr
        with (mountpoint / "one/model").open("rb") as model:
            first = model.read(1000)
            declare(stores)
            done = mountctl("upgrade", "models")
            assert done.returncode == 0, done.stderr
            assert first + model.read() == MODEL
        wait_until((mountpoint / "hub/other/model").exists, timeout_s=10)
        assert (mountpoint / "hub/other/model").read_bytes() == OTHER
        assert (mountpoint / "one/model").read_bytes() == MODEL
        mount = MountedStore(mountpoint, tmp_path / "cache")
        assert fetched(mount) <= len(OTHER), "what was there is not fetched again"
        assert mountctl("up").returncode == 0, "it is up already"
        declare({"hub/other": stores["hub/other"]})
        assert mountctl("upgrade", "models").returncode == 0
        wait_until(lambda: os.listdir(mountpoint) == ["hub"], timeout_s=10)
        assert (mountpoint / "hub/other/model").read_bytes() == OTHER
    finally:
        mountctl("down", "--lazy")


def test_a_store_that_gets_a_path_beside_others_keeps_its_cache(stores: dict[str, Path], tmp_path: Path) -> None:
    with mounted(stores["one"], tmp_path / "mount") as mount:
        assert (mount.path / "model").read_bytes() == MODEL
        assert fetched(mount) == len(MODEL)
    file = configuration(tmp_path / "models.toml", dict(stores))
    with mounted(None, tmp_path / "mount", "--config", file) as mount:
        assert (mount.path / "one/model").read_bytes() == MODEL
        assert fetched(mount) == 0
    with mounted(stores["one"], tmp_path / "mount") as mount:
        assert (mount.path / "model").read_bytes() == MODEL
        assert fetched(mount) == 0


def test_root_s_mount_reads_each_directory_by_a_broker_of_its_own(stores: dict[str, Path], tmp_path: Path) -> None:
    for directory in stores.values():
        directory.chmod(0o700)
        (directory / "model").chmod(0o600)
    file = configuration(tmp_path / "models.toml", dict(stores))
    with mounted(None, tmp_path / "mount", "--config", file) as mount:
        assert (mount.path / "one/model").read_bytes() == MODEL
        assert (mount.path / "hub/other/model").read_bytes() == OTHER
        processes = json.loads(trimsfs("status", "--json", mount.path).stdout)[0]["processes"]
        assert processes["broker"] == 2
