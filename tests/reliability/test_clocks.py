"""A host whose clock starts in 1970, as without a battery, and is set later: stores, caches and what operators see."""

import contextlib
import json
import os
import re
import time
from pathlib import Path

import pytest

from tests.reliability.caches import disagreements
from tests.reliability.looks import Looks, models_in, restarts
from tests.services import put
from tests.services.seaweed import Seaweed
from tests.support.clocks import NOON, Clock
from tests.support.keepers import kill
from tests.support.mounts import let_in, log_beside, mountctl, mounted, trimsfs, unmount, wait_until
from tests.support.survival import Survived

OBJECTS = {f"m/{name}": name.encode() * 100_000 for name in ("a", "b")}
SIZES = (2 << 20, 300_000, 5)
LONGEST_S = 300
"""More than any of these tests takes: what is older was dated by another clock."""


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    """A clock that says the second of January 1970."""
    clock = Clock(tmp_path / "clock")
    clock.set(NOON)
    return clock


def make_bucket(server: Seaweed, name: str) -> None:
    with contextlib.closing(server.client()) as client:
        client.create_bucket(Bucket=name)
    put(server, name, OBJECTS)


def refused(code: int, store: str, directory: Path, environment: dict[str, str]) -> str:
    """What a mount says in one line that fails with an exit code."""
    mountpoint = directory / "models"
    directory.mkdir()
    let_in(directory)
    places = ("--cache-dir", directory / "cache", "--log-file", log_beside(directory))
    done = trimsfs("mount", store, mountpoint, *places, environment=environment)
    unmount(mountpoint) if done.returncode == 0 else None
    assert (done.returncode, done.stderr.count("\n")) == (code, 1), done.stderr
    return done.stderr


@pytest.mark.slow
def test_a_mount_that_began_in_1970_goes_on_when_the_clock_is_set(
    clock: Clock, store_directory: Path, tmp_path: Path, survived: Survived
) -> None:
    store, variables = models_in(store_directory, SIZES), clock.environment()
    with mounted(store, tmp_path / "mount", environment=variables) as mount:
        looks = Looks(mount, store)
        looks.read()
        assert trimsfs("pin", mount.path / "model-0", environment=variables).returncode == 0
        assert trimsfs("warm", "--background", mount.path / "model-1", environment=variables).returncode == 0
        kill(mount)
        looks.read()
        assert mount.log().splitlines()[-1].startswith("1970-01-02 ")
        assert mount.path.stat().st_mtime < 2 * NOON

        clock.correct()
        looks.read()
        done = mountctl("status", mount.path)
        ended = re.search(r"the last one ended (\d+) s ago", done.stdout)
        assert done.returncode == 0, done.stdout
        assert ended is not None, done.stdout
        assert int(ended[1]) < LONGEST_S
        kill(mount)
        looks.read()
        assert mountctl("restart", mount.path).returncode == 0
        looks.read()
        assert mount.log().splitlines()[-1].startswith(time.strftime("%Y-"))
        for command in ("status", "jobs", "ls", "top", "trace"):
            done = trimsfs(command, mount.path)
            assert done.returncode == 0, done.stderr
        for name in ("model-0/part-0", "model-1/part-0"):
            assert trimsfs("verify", mount.path / name).returncode == 0
        assert looks.errors == {}
        assert restarts(mount) == 3
        looks.check(survived, "clock in 1970, then set", injected=1)

    clock.set(NOON)
    with mounted(store, tmp_path / "mount", environment=variables) as mount:  # its cache is of later than now
        looks = Looks(mount, store)
        looks.read()
        assert mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == 0
        assert mount.info("model-0/part-0")["pinned"]
        looks.check(survived, "clock back in 1970")
    assert disagreements(mount.cache) == []


@pytest.mark.slow
def test_a_store_that_refuses_a_clock_of_1970_is_told_and_used_once_it_is_set(
    clock: Clock, seaweed: Seaweed, tmp_path: Path
) -> None:
    make_bucket(seaweed, "clock")
    directory, environment = tmp_path / "mount", seaweed.environment() | clock.environment()
    told = refused(6, "s3://clock", directory, environment)
    assert "RequestTimeTooSkewed" in told
    assert " behind: set it by NTP: " in told
    doctor = ("doctor", "--store", "s3://clock", "--cache-dir", directory / "cache", "passthrough=no", "gpu=off")
    done = trimsfs(*doctor, environment=environment)
    assert done.returncode == 1
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FAIL  store: "))
    assert " behind: set it by NTP: " in line

    clock.correct()
    with mounted("s3://clock", directory, "--prefetch", "off", environment=environment) as mount:
        assert (mount.path / "m/a").read_bytes() == OBJECTS["m/a"]
        clock.set(NOON)
        assert (mount.path / "m/a").read_bytes() == OBJECTS["m/a"]
        with pytest.raises(PermissionError):
            (mount.path / "m/b").read_bytes()
        assert " behind: set it by NTP: " in os.getxattr(mount.path / "m/b", "user.trims.problem").decode()
        wait_until(lambda: trimsfs("status", mount.path).returncode == 1)
        assert "RequestTimeTooSkewed" in trimsfs("status", mount.path).stdout
        clock.correct()
        wait_until(lambda: trimsfs("status", mount.path).returncode == 0, 30)
        assert (mount.path / "m/b").read_bytes() == OBJECTS["m/b"]
        assert restarts(mount) == 0
        assert "Traceback" not in mount.log()


@pytest.mark.slow
def test_a_certificate_that_is_not_valid_yet_is_told_by_the_clock_and_used_once_it_is_set(
    clock: Clock, seaweed: Seaweed, tmp_path: Path
) -> None:
    make_bucket(seaweed, "clock-tls")
    directory, environment = tmp_path / "mount", seaweed.over_https().environment() | clock.environment()
    cause = "certificate is not yet valid: the clock of this host says 1970-01-02 "
    told = refused(7, "s3://clock-tls", directory, environment)
    assert cause in told
    assert ": set it by NTP: " in told
    assert "AWS_CA_BUNDLE" not in told
    assert "network" not in told

    clock.correct()
    with mounted("s3://clock-tls", directory, "--prefetch", "off", environment=environment) as mount:
        assert (mount.path / "m/a").read_bytes() == OBJECTS["m/a"]
    clock.set(NOON)
    with mounted("s3://clock-tls", directory, "--prefetch", "off", environment=environment) as mount:
        assert (mount.path / "m/a").read_bytes() == OBJECTS["m/a"]  # what the cache knows is served at once
        wait_until(lambda: cause in trimsfs("status", mount.path).stdout, 30)
        assert trimsfs("status", mount.path).returncode == 1
        clock.correct()
        wait_until(lambda: trimsfs("status", mount.path).returncode == 0, 30)
        assert (mount.path / "m/b").read_bytes() == OBJECTS["m/b"]
        assert "Traceback" not in mount.log()


def test_a_version_that_was_pushed_in_1970_is_listed_read_and_removed(clock: Clock, tmp_path: Path) -> None:
    """The store is a directory, which checks no clock."""
    model, store, variables = tmp_path / "model", tmp_path / "store", clock.environment()
    model.mkdir()
    store.mkdir()
    (model / "params").write_bytes(OBJECTS["m/a"])
    for version in ("v1", "v2"):
        done = trimsfs("push", model, f"{store}/llama:{version}", environment=variables)
        assert done.returncode == 0, done.stderr
    done = trimsfs("alias", f"{store}/llama", "prod", "v2", environment=variables)
    assert done.returncode == 0, done.stderr
    listed = json.loads(trimsfs("versions", "--json", f"{store}/llama").stdout)["versions"]
    assert [each["created"][:10] for each in listed] == ["1970-01-02"] * 2
    done = trimsfs("rm", f"{store}/llama:v1", environment=variables)
    assert done.returncode == 0, done.stderr
    # By the clock of now, its time of grace ended long ago.
    done = trimsfs("rm", "--expired", f"{store}/llama")
    assert (done.returncode, "no removed version whose grace period is over" in done.stdout) == (0, True), done.stderr
    assert (store / "llama/v1/params").read_bytes() == OBJECTS["m/a"]
    with mounted(store, tmp_path / "mount") as mount:
        assert (mount.path / "llama/prod/params").read_bytes() == OBJECTS["m/a"]
        assert not (mount.path / "llama/v1").exists()
