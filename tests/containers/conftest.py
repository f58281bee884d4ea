"""A shared directory with a mount in it, and what runs containers."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.containers.engines import DEVICES, USERS, Podman, Users, make_root, packaged
from tests.containers.host import Host, entered_by_all, prepared
from tests.support.mounts import MountedStore


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system for containers; not to be written to."""
    directory = entered_by_all(tmp_path_factory.mktemp("root"))
    make_root(directory)
    return directory


@pytest.fixture(scope="session")
def podman(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Podman, and an empty directory where it looks for devices."""
    directory = entered_by_all(tmp_path_factory.mktemp("podman"))
    made = [path for path in (DEVICES, DEVICES.parent) if not path.exists()]
    DEVICES.mkdir(parents=True, exist_ok=True)
    engine = Podman(directory)
    engine.set_up(root)
    yield engine
    engine("rm", "--all", "--force", "--time", "0")
    shutil.rmtree(directory, ignore_errors=True)
    for path in made:
        with suppress(OSError):  # another process of the tests may have it
            path.rmdir()


@pytest.fixture
def devices(podman: Podman) -> Iterator[Path]:
    """Where podman finds specs; empty before and after."""
    yield podman.devices
    for path in podman.devices.iterdir():
        path.unlink()


@pytest.fixture
def own_root(root: Path, tmp_path: Path) -> Path:
    """A root file system of the test's own."""
    directory = tmp_path / "own-root"
    shutil.copytree(root, directory, symlinks=True)
    for above in (tmp_path, *tmp_path.parents[:2]):
        above.chmod(0o755)
    return directory


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A shared directory in which `models` is mounted."""
    with prepared(tmp_path_factory.mktemp("host")) as found:
        yield found


@pytest.fixture
def fresh_host(tmp_path: Path) -> Iterator[Host]:
    """A shared directory in which nothing is mounted yet."""
    (tmp_path / "fresh").mkdir()
    with prepared(entered_by_all(tmp_path) / "fresh") as found:
        yield found


@pytest.fixture(scope="module")
def models(host: Host) -> Iterator[MountedStore]:
    """The models, mounted."""
    with host.mounted() as mount:
        yield mount


@pytest.fixture(scope="module", params=["root", pytest.param("user", marks=pytest.mark.slow), "namespace"])
def users(request: pytest.FixtureRequest) -> Users:
    """Root, another user, and a user in a user namespace."""
    return USERS[request.param]


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host that nothing is to be made or mounted in."""
    entered_by_all(tmp_path)
    directory = tmp_path / "outside"
    directory.mkdir()
    directory.chmod(0o777)
    yield directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o777
    assert os.listdir(directory) == []
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()


@pytest.fixture
def hooks(tmp_path: Path) -> Path:
    """The directory of hooks as it is packaged."""
    directory = tmp_path / "hooks.d"
    directory.mkdir()
    (directory / "trimsfs.json").write_text(json.dumps(packaged("hooks.d/trimsfs.json")))
    return directory
