"""A store that does not answer, on real mounts: what is here is used as if it did."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from tests.services import S3Server
from tests.services.fast import start_fast
from tests.services.switch import Switch, switched
from tests.support import mounts
from tests.support.mounts import MOUNTCTL, MountedStore, again_while_copied, mounted, trimsfs, unmount, wait_until
from tests.support.parts import recorded_names
from trimsfs.namespace.lifetimes import ABSENT_AFTER_S

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 100_000}
ABSENT = ("model.safetensors.index.json", "added_tokens.json")
DEADLINE_S = 1
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


def test_a_name_that_is_known_does_not_wait_for_one_that_is_not(
    endpoint: tuple[S3Server, Switch], tmp_path: Path
) -> None:
    server, switch = endpoint
    options = ("--metadata-ttl", "0.5")
    waited = None
    for attempt in map(str, range(5)):
        if waited is None:
            with mounted("s3://bucket", tmp_path / attempt, *options, environment=server.environment()) as mount:
                waited = waits_meanwhile(mount, switch)
    assert waited


def waits_meanwhile(mount: MountedStore, switch: Switch) -> bool | None:
    """Whether who asks for an unknown name waits until a known one was found; None if it may have waited so long."""
    model = mount.path / "model/model.safetensors"
    assert model.read_bytes() == FILES["model.safetensors"]
    switch.hold()
    time.sleep(1)  # the listing expires
    began = time.monotonic()
    with subprocess.Popen(["stat", mount.path / "model/unknown"], stderr=subprocess.DEVNULL) as waiting:
        wait_until(
            lambda: waiting.poll() is not None or "model/unknown" in {wait["path"] for wait in mount.control()["waits"]}
        )
        assert subprocess.run(["stat", model], capture_output=True, timeout=60, check=False).returncode == 0
        waits = waiting.poll() is None
        soon = time.monotonic() - began < ABSENT_AFTER_S - 0.5
        waiting.kill()
    switch.let_go()
    return waits if waits or soon else None


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
        wait_until(lambda: mount.metrics()["trimsfs_store_circuit_open"] == 1)
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


def test_a_store_directory_that_is_gone_is_away(store_directory: Path, tmp_path: Path) -> None:
    """As one on a network file system that is not mounted: nothing is absent, and it counts again once it is back."""
    (store_directory / "model").mkdir()
    for name in ("here", "not-here"):
        (store_directory / "model" / name).write_bytes(name.encode() * 1000)
    with mounted(store_directory, tmp_path, *OPTIONS, "--prefetch", "off") as mount:
        assert (mount.path / "model/here").read_bytes() == b"here" * 1000
        assert os.listdir(mount.path / "model") == ["here", "not-here"]
        store_directory.rename(tmp_path / "moved")
        time.sleep(1)
        began = time.monotonic()
        with pytest.raises(OSError, match="Input/output error"):
            (mount.path / "model/not-here").read_bytes()
        assert time.monotonic() - began >= DEADLINE_S / 2
        wait_until(lambda: told(mount)[0] == 1)
        assert "does not exist: is it mounted?" in (told(mount)[1] or "")
        assert os.listdir(mount.path / "model") == ["here", "not-here"]
        assert (mount.path / "model/here").read_bytes() == b"here" * 1000
        (tmp_path / "moved").rename(store_directory)
        wait_until(lambda: told(mount) == (0, None))
        assert (mount.path / "model/not-here").read_bytes() == b"not-here" * 1000


@OUTAGES
def test_a_mount_starts_while_its_store_is_away(endpoint: tuple[S3Server, Switch], how: str, tmp_path: Path) -> None:
    server, switch = endpoint
    with mounted_at(server, tmp_path) as mount:
        load(mount)
        wait_until(lambda: recorded_names(mount.cache) >= {"model", *FILES})
    away(switch, how)
    began = time.monotonic()
    with mounted_at(server, tmp_path) as mount:
        assert time.monotonic() - began < 14  # the deadline is 15 s if it is not set
        load(mount)
        assert told(mount)[0] == 1
        why = "no answer: Could not connect to the endpoint URL" if how == "gone" else "no answer within 1 s"
        assert f"serving what is cached until the store answers: s3://bucket: {why}" in mount.log()
        switch.let_go()
        if how == "gone":
            switch.on()
        wait_until(lambda: told(mount) == (0, None))
        new = tmp_path / "buckets/bucket/new"
        new.write_bytes(b"uploaded")
        wait_until(lambda: (mount.path / "new").read_bytes() == b"uploaded", tolerate=OSError)


def declare(directory: Path, name: str, cache: Path) -> Path:
    """Declare a mount of the bucket; its mount point."""
    mountpoint = directory / name
    lines = [f'mountpoint = "{mountpoint}"', 'store = "s3://bucket"', f'cache_dir = "{cache}"']
    lines += [f'log_file = "{directory / name}.log"', 'server_user = "root"', f"retry_deadline = {DEADLINE_S}"]
    (directory / "mounts.d").mkdir(exist_ok=True)
    (directory / f"mounts.d/{name}.toml").write_text("\n".join(lines))
    return mountpoint


def forget_pages(cache: Path) -> None:
    """Have the kernel drop what it has of a cache in memory, as a boot does."""
    os.sync()
    for path in cache.glob("blobs/**/*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def test_pinned_models_are_there_after_a_boot_and_new_mounts_wait_for_the_store(
    endpoint: tuple[S3Server, Switch], tmp_path: Path
) -> None:
    """The first mount has the models before there is a network; the cache of the second knows nothing of the store."""
    server, switch = endpoint
    pinned, new = declare(tmp_path, "pinned", tmp_path / "cache"), declare(tmp_path, "new", tmp_path / "other")
    environment = os.environ | server.environment() | {"TRIMSFS_MOUNTS_DIR": str(tmp_path / "mounts.d")}
    mountctl = partial(mounts.mountctl, environment=environment)
    try:
        assert mountctl("up", "pinned").returncode == 0
        assert trimsfs("pin", pinned / "model").returncode == 0
        wait_until(lambda: recorded_names(tmp_path / "cache") >= {"model", *FILES})
        assert again_while_copied(lambda: mountctl("down")).returncode == 0
        switch.off()
        forget_pages(tmp_path / "cache")

        up = mountctl("up")
        assert (up.returncode, up.stderr.count("\n")) == (7, 2), up.stderr
        assert "mountctl: pinned: the store does not answer: " in up.stderr
        assert "or wait for it: `mountctl up --wait-for-store new`" in up.stderr
        mount = MountedStore(pinned, tmp_path / "cache")
        for name, content in FILES.items():
            assert (pinned / "model" / name).read_bytes() == content
            assert mount.info(f"model/{name}")["pinned"]
        wait_until(lambda: mount.metrics()["trimsfs_host_locked_bytes"] == sum(map(len, FILES.values())))

        command = [MOUNTCTL, "up", "--wait-for-store", "new"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as waiting:
            assert waiting.stdout is not None
            assert waiting.stdout.readline() == "waiting up to 300 s for the store of new\n"
            switch.on()
            waiting.communicate(timeout=60)
        assert waiting.returncode == 0
        assert (new / "model/config.json").read_bytes() == b"{}"
    finally:
        for mountpoint in (pinned, new):
            unmount(mountpoint)
