"""A push or import that is killed shows no part of a version, and the next one uploads only what is missing."""

import contextlib
import hashlib
import math
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import trio

from tests.contract.backends import new_bucket, s3_options, use_only
from tests.services import HOST, S3Server
from tests.services.hub import Hub
from tests.versions.proxy import Proxy, proxy_of
from tests.versions.pusher import PART, ran, started
from trimsfs.formats.version_records import Manifest
from trimsfs.options import MountOptions
from trimsfs.stores.open import open_writer

SMALL_FILES = 5
LARGE_SIZE = 2 * PART + 1000
MOST_TRIALS = 30
"""Most pushes that are killed until one is that has kept something."""
Choose = Callable[[int], list[tuple[int, bool]]]
"""Draws some of so many requests, and whether each is killed before or after the server has got it."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of small files and one of three parts."""
    directory = tmp_path_factory.mktemp("model")
    (directory / "large.bin").write_bytes(os.urandom(LARGE_SIZE))
    (directory / "more").mkdir()
    for number in range(SMALL_FILES):
        (directory / f"more/{number}.json").write_bytes(os.urandom(999))
    return directory


@pytest.fixture(scope="module")
def own_proxy(seaweed: S3Server) -> Iterator[Proxy]:
    with proxy_of(seaweed) as proxy:
        yield proxy


@pytest.fixture
def proxy(own_proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    """A proxy in front of SeaweedFS, whose credentials are in the environment."""
    use_only(own_proxy.target, monkeypatch)
    return own_proxy


def seen(options: MountOptions, name: str) -> Manifest | None:
    """The manifest of a model's version v, after a check that its files are as it says; None if it is not published."""

    async def look() -> Manifest | None:
        writer = open_writer(options, scratch="unused", max_requests=4)
        try:
            found = await writer.read(f"{name}/.trims-versions/v.json")
            if found is None:
                return None
            manifest = Manifest.parse(found[0])
            for path, file in manifest.files.items():
                content = await writer.read(f"{name}/v/{path}")
                assert content is not None, path
                assert (len(content[0]), hashlib.sha256(content[0]).hexdigest()) == (file.size, file.sha256), path
                assert content[1] == file.etag
            return manifest
        finally:
            await writer.aclose()

    return trio.run(look)


def check_complete(options: MountOptions, name: str, model: Path) -> None:
    manifest = seen(options, name)
    assert manifest is not None
    sizes = {str(file.relative_to(model)): file.stat().st_size for file in model.rglob("*") if file.is_file()}
    assert {path: file.size for path, file in manifest.files.items()} == sizes


def killed_at_requests(
    proxy: Proxy,
    model: Path,
    directory: Path,
    choose: Choose,
    *,
    command: Sequence[str] = (),
    more: Mapping[str, str] | None = None,
) -> None:
    """Kill a push at each of the requests that *choose* draws.

    Or another *command* that publishes the same files, with *more* in its environment.
    """
    with contextlib.closing(proxy.target.client()) as client:
        bucket = new_bucket(client).bucket
    server, log = proxy.server, directory / "log"
    environment = {**server.environment(), **(more or {})}

    def push(name: str) -> list[str]:
        return [*(command or ["push", str(model)]), f"s3://{bucket}/{name}:v", "--addressing-style", "path"]

    options = s3_options(proxy.target.endpoint_url, bucket)
    proxy.restart()
    assert ran(push("whole"), log, environment) == 0, log.read_text()
    whole = len(proxy.uploads())
    assert whole == SMALL_FILES + 3
    kept = 0
    for trial, (number, answered) in enumerate(choose(proxy.count)):
        name = f"m{trial}"
        proxy.restart()
        with started(push(name), log, environment) as process:

            def kill(count: int, number: int = number, process: object = process) -> bool:
                if count == number:
                    process.kill()  # type: ignore[attr-defined]
                return count >= number

            if answered:
                proxy.after = kill
            else:
                proxy.before = kill
            process.join(60)
            assert process.exitcode is not None
        proxy.settle()
        first = set(proxy.uploads())
        seen(options, name)
        proxy.restart()
        assert ran(push(name), log, environment) == 0, log.read_text()
        check_complete(options, name, model)
        second = proxy.uploads()
        assert len(second) == len(set(second))
        assert not first & set(second), "what the killed push had uploaded was uploaded again"
        assert len(first) + len(second) == whole, (number, answered, first, second)
        kept += len(first)
    assert kept > 0


def some(count: int) -> list[tuple[int, bool]]:
    """Requests all over a push of so many."""
    return [(count * part // 6, part % 2 > 0) for part in range(1, 7)]


def at_random(count: int) -> list[tuple[int, bool]]:
    """100 requests of a push of so many."""
    chance = random.Random()
    return [(chance.randint(1, count), chance.random() < 0.5) for _ in range(100)]


MANY = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("choose", [some, pytest.param(at_random, marks=MANY)])
def test_a_push_that_is_killed_at_some_requests(proxy: Proxy, model: Path, tmp_path: Path, choose: Choose) -> None:
    killed_at_requests(proxy, model, tmp_path, choose)


@pytest.fixture
def on_the_hub(model: Path, hub: Hub) -> str:
    """The same files in a repository of a hub: the small ones are not in LFS, so that it tells no SHA-256 of them."""
    name = f"org-{uuid.uuid4().hex[:12]}/m"
    for file in (file for file in model.rglob("*") if file.is_file()):
        hub.put(f"model/{name}", str(file.relative_to(model)), file.read_bytes())
    return name


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("choose", [some, at_random])
def test_an_import_from_a_hub_that_is_killed_at_some_requests(
    proxy: Proxy, hub: Hub, on_the_hub: str, model: Path, tmp_path: Path, choose: Choose
) -> None:
    more = {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": HOST}
    killed_at_requests(proxy, model, tmp_path, choose, command=["import", f"hf://{on_the_hub}"], more=more)


@pytest.mark.parametrize("trials", [6, pytest.param(100, marks=MANY)])
def test_a_push_to_a_directory_that_is_killed_at_some_moments(model: Path, tmp_path: Path, trials: int) -> None:
    store, log = tmp_path / "store", tmp_path / "log"
    store.mkdir()
    options = MountOptions(store=str(store))
    chance = random.Random(11)
    assert ran(["push", str(model), f"{store}/first:v"], log) == 0, log.read_text()  # loads what is forked later
    usual = math.inf
    for name in ("second", "third"):
        before = time.monotonic()
        assert ran(["push", str(model), f"{store}/{name}:v"], log) == 0, log.read_text()
        usual = min(usual, time.monotonic() - before)
    dead = kept = trial = 0
    while trial < trials or (trial < MOST_TRIALS and not (kept and dead)):
        name, trial = f"m{trial}", trial + 1
        with started(["push", str(model), f"{store}/{name}:v"], log) as process:
            process.join(chance.uniform(0, usual))
            process.kill()
            process.join(30)
            dead += process.exitcode != 0
        seen(options, name)
        files = {file: file.stat().st_ino for file in (store / name / "v").rglob("*")}
        kept += len(files)
        assert ran(["push", str(model), f"{store}/{name}:v"], log) == 0, log.read_text()
        check_complete(options, name, model)
        assert {file: file.stat().st_ino for file in files} == files, "a file was written again"
        assert list((store / name / ".trims-versions/scratch").iterdir()) == []
    assert kept > 0
    assert dead > 0
