"""What mountctl does with a real systemd, which starts and stops the units of declared mounts."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.booted import SYSTEMD, Booted, booted
from tests.support.mounts import let_in

pytestmark = pytest.mark.skipif(not SYSTEMD.exists(), reason="systemd is not installed")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the declared mounts, their stores, caches and mount points."""
    return tmp_path_factory.mktemp("mounts.d")


@pytest.fixture(scope="module")
def system(directory: Path) -> Iterator[Booted]:
    with booted(directory) as system:
        yield system


@pytest.fixture
def mountpoint(directory: Path, system: Booted) -> Iterator[Path]:
    """The mount point of the declared mount ``models``, down at first and in the end."""
    store = directory / "store"
    store.mkdir(exist_ok=True)
    let_in(directory)
    (store / "model").write_bytes(b"weights")
    lines = [f'mountpoint = "{directory / "models"}"', f'store = "{store}"', f'cache_dir = "{directory / "cache"}"']
    (directory / "models.toml").write_text("\n".join(lines))
    yield directory / "models"
    system.run("systemctl", "stop", "trimsfs@models")


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Keep servers from a cache directory, as another server would."""
    cache.mkdir(exist_ok=True)
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_up_and_down_start_and_stop_the_unit(system: Booted, mountpoint: Path) -> None:
    done = system.mountctl("up", "models")
    assert (done.returncode, done.stderr) == (0, "")
    assert system.state("models") == "active"
    assert system.run("cat", mountpoint / "model").stdout == "weights"
    assert system.mountctl("down", "models").returncode == 0
    assert system.state("models") == "inactive"
    assert system.mountctl("down", "models").stdout == "models is down\n"


def test_up_tells_why_the_unit_failed_and_down_ends_its_retries(system: Booted, mountpoint: Path) -> None:
    cache = mountpoint.with_name("cache")
    with locked(cache):
        done = system.mountctl("up", "models")
        assert (done.returncode, done.stderr.count("\n")) == (8, 1), done.stderr
        assert done.stderr.startswith(f"mountctl: models: cache directory {cache} is in use by another server")
        assert system.state("models") == "activating"
        assert system.mountctl("down", "models").stdout == "models is down\n"
        assert system.state("models") == "inactive"


def test_up_tells_which_option_the_unit_cannot_use(system: Booted, mountpoint: Path) -> None:
    with (mountpoint.parent / "models.toml").open("a") as file:
        file.write("\ncache_size = '1 stone'")
    done = system.mountctl("up", "models")
    assert done.returncode == 2
    assert done.stderr.startswith("mountctl: models: option cache_size = '1 stone' in ")
