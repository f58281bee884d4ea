"""Upgrades in each documented way, over and over, under a reader: no error, and what is cached stays cached.

``make dist`` has built the wheels and the package. Each version is its own successor, so a roll back is the same. New
images are tried in ``tests/containers/test_keeper_containers.py``.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.packages.roots import WHEELHOUSE, BootedRoot, built, make_root

TIMES = 50
BY_HAND = "/opt/trimsfs/bin/trimsfs mount /store /models", "/usr/bin/trimsfs umount /models"
DECLARED = "/usr/bin/mountctl up models", "/usr/bin/mountctl down models"
WAYS = {
    "wheel to wheel": (
        BY_HAND,
        """
        /opt/trimsfs/bin/pip install -q --force-reinstall --no-deps --no-index --find-links /wheelhouse trimsfs
        /opt/trimsfs/bin/mountctl upgrade /models
        """,
    ),
    "wheel to package": (BY_HAND, "/usr/bin/mountctl upgrade /models", "/opt/trimsfs/bin/mountctl upgrade /models"),
    "package to package": (DECLARED, "dpkg --install /trimsfs.deb"),
    "user to user": (
        DECLARED,
        *(
            f"""
            echo 'server_user = "{user}"' | cat /models.toml - > /etc/trimsfs/mounts.d/models.toml
            /usr/bin/mountctl upgrade models
            """
            for user in ("root", "games", "trimsfs")
        ),
    ),
}
READ = """
while test ! -e /stop; do
    cmp /store/model /models/model && test "$(ls /models)" = model || date
    echo >> /reads
done > /wrong 2>&1
"""

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BootedRoot]:
    """A Debian with the wheel in an environment and the package."""
    root = make_root(tmp_path_factory.mktemp("upgrades") / "root", "procps", "python3-venv", "systemd-sysv")
    shutil.copytree(WHEELHOUSE, root.path / "wheelhouse")
    shutil.copy(built("trimsfs_*.deb"), root.path / "trimsfs.deb")
    (root.path / "models.toml").write_text('mountpoint = "/models"\nstore = "/store"\n')
    (root.path / "read").write_text(READ)
    with root.booted() as system:
        system.run("""
            apt-get -q update
            apt-get -q -y install --no-install-recommends /trimsfs.deb
            cp /models.toml /etc/trimsfs/mounts.d
            python3 -m venv /opt/trimsfs
            /opt/trimsfs/bin/pip install -q --no-index --find-links /wheelhouse trimsfs
        """)
        yield system


@contextmanager
def reading(system: BootedRoot) -> Iterator[None]:
    """Read the file and list the directory all the time; nothing may go wrong."""
    system.run("rm -f /stop /reads; setsid sh /read < /dev/null > /dev/null 2>&1 &")
    try:
        yield
    finally:
        system.run("touch /stop; sleep 2")
    system.run("cat /wrong; test ! -s /wrong; test $(wc -l < /reads) -gt 100")


@pytest.mark.parametrize("way", WAYS)
def test_upgrades_are_not_noticed_and_the_cache_stays(system: BootedRoot, way: str) -> None:
    (mount, unmount), *upgrades = WAYS[way]
    system.run(f"{mount}; cmp /store/model /models/model")
    try:
        with reading(system):
            for number in range(TIMES):
                system.run(f"""
                    before=$(pgrep -f '^trimsfs server')
                    {upgrades[number % len(upgrades)]}
                    test "$before" != "$(pgrep -f '^trimsfs server')"
                    cmp /store/model /models/model
                    grep -x 'trimsfs_fetch_fetched_bytes_total 0.0' /models/.trims/metrics
                """)
    finally:
        system.run(unmount)
