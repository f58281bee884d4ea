"""A store that stands still, dies, changes its objects and its keys, or does all that at once."""

import contextlib
import datetime
import json
import os
import random
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.reliability.scenes import Scene, check, command, scene, unharmed
from tests.services.ceph import Ceph, start_ceph
from tests.services.faults import FAULTS
from tests.services.faulty import Plan
from tests.support.http_server import Server
from tests.support.readers import Report
from tests.support.survival import Survived

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


@pytest.fixture(scope="module")
def own_ceph() -> Iterator[Ceph]:
    """A server that may be killed, as no other test uses it."""
    with start_ceph() as server:
        yield server


@pytest.fixture(scope="module")
def stage(own_ceph: Ceph, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A mount of that server."""
    with scene(own_ceph, tmp_path_factory.mktemp("stage")) as made:
        yield made


@pytest.fixture
def client(own_ceph: Ceph) -> Iterator["S3Client"]:
    """A client that nothing happens to."""
    with contextlib.closing(own_ceph.client()) as client:
        yield client


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_objects_that_are_replaced_and_deleted_are_never_mixed(
    seconds: int, stage: Scene, client: "S3Client", survived: Survived
) -> None:
    steady, spare = stage.put(f"replaced-{seconds}", listed=True)
    fleeting, _ = stage.put(f"deleted-{seconds}", listed=True)
    draw = random.Random(3)
    with unharmed(stage):
        readers = stage.reading(steady, fleeting)
        ends, changes = time.monotonic() + seconds, 0
        while time.monotonic() < ends:
            change(stage, client, draw, steady, fleeting)
            changes += 1
        report = readers.stop()
        for name in fleeting:
            stage.objects.put(client, name)
        recovery = stage.settled([spare, *steady, *fleeting])
    check(survived, "objects replaced and deleted", report, changes, recovery, ("ESTALE",))


def change(stage: Scene, client: "S3Client", draw: random.Random, steady: list[str], fleeting: list[str]) -> None:
    stage.objects.put(client, draw.choice(steady))
    name = draw.choice(fleeting)
    if draw.random() < 0.5:
        stage.objects.delete(client, name)
    else:
        stage.objects.put(client, name)


@contextlib.contextmanager
def agent(keys: list[tuple[str, str]]) -> Iterator[dict[str, str]]:
    """The environment in which the SDK gets the last of some keys as of a container's agent, and asks again soon."""

    def answer(_request: BaseHTTPRequestHandler) -> tuple[int, dict[str, str], bytes]:
        expires = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)).isoformat()
        access_key, secret_key = keys[-1]
        told = {"AccessKeyId": access_key, "SecretAccessKey": secret_key, "Token": "", "Expiration": expires}
        return 200, {}, json.dumps(told).encode()

    with Server(answer).running() as server:
        yield {
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{server.url}/",
            "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
            "AWS_ACCESS_KEY_ID": "",
            "AWS_SECRET_ACCESS_KEY": "",
        }


def refused(stage: Scene, name: str) -> bool:
    """Whether a file cannot be read for want of credentials."""
    try:
        stage.read(name)
    except PermissionError:
        return True
    return False


@pytest.mark.slow
def test_keys_that_are_rotated_are_followed(own_ceph: Ceph, tmp_path: Path, survived: Survived) -> None:
    """While the old key is gone and the new one not told yet, what is not here gives EACCES."""
    old, new = own_ceph.add_key(), own_ceph.add_key()
    keys = [old]
    with agent(keys) as environment, scene(own_ceph, tmp_path, environment=environment) as stage:
        names, spare = stage.put("cold", listed=True)
        with unharmed(stage):
            stage.read(names[0])
            own_ceph.remove_key(old[0])
            assert any(refused(stage, name) for name in names[1:])  # some may have been fetched ahead
            stage.read("warm/0")
            stage.read(names[0])
            keys.append(new)
            recovery = stage.recovered([spare, *names])
        report = Report(operations=5, worst_s={"read": recovery})
        check(survived, "keys rotated", report, 1, recovery)


# Below, the gateway is killed, after which Ceph takes half a minute to make a bucket


def test_a_store_that_stands_still_or_is_killed_is_waited_for(
    own_ceph: Ceph, tmp_path: Path, survived: Survived
) -> None:
    with scene(own_ceph, tmp_path, "--retry-deadline", "60") as stage, unharmed(stage):
        names, spare = stage.put("halted", listed=True)
        readers = stage.reading(names)
        time.sleep(0.1)
        own_ceph.gateway.halt()
        time.sleep(1)
        own_ceph.gateway.resume()
        time.sleep(0.2)
        own_ceph.gateway.kill()
        time.sleep(0.5)
        own_ceph.gateway.start()
        recovery = stage.recovered([spare, *names])
        report = readers.stop()
    check(survived, "S3 server halted, then killed", report, 2, recovery)


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize("seed", [1])
def test_everything_at_once(
    seconds: int, seed: int, own_ceph: Ceph, stage: Scene, client: "S3Client", survived: Survived
) -> None:
    draw = random.Random(seed)
    steady, spare = stage.put(f"steady-{seconds}", listed=True)
    fleeting, _ = stage.put(f"fleeting-{seconds}", listed=True)
    plan = Plan(faults=sorted(FAULTS.keys() - {"flipped bit"}), share=0.3, seed=seed)
    with unharmed(stage):
        stage.through.inject(plan)
        readers = stage.reading(steady, fleeting)
        ends, others = time.monotonic() + seconds, 0
        while time.monotonic() < ends:
            change(stage, client, draw, steady, fleeting)
            others += 1
            with contextlib.suppress(OSError):
                command(stage.mount.path / os.path.dirname(draw.choice([*steady, *fleeting])), "evict")
            if draw.random() < 0.03:
                own_ceph.gateway.halt()
                time.sleep(draw.uniform(0.1, 1))
                own_ceph.gateway.resume()
            elif draw.random() < 0.02:
                own_ceph.gateway.kill()
                own_ceph.gateway.start()
            time.sleep(draw.uniform(0, 0.1))
        report = readers.stop()
        for name in fleeting:
            stage.objects.put(client, name)
        injected = stage.through.injected().total() + others
        stage.through.heal()
        recovery = stage.settled([spare, *steady, *fleeting])
    check(survived, f"everything for {seconds} s", report, injected, recovery, ("EIO", "EACCES", "ESTALE"))
