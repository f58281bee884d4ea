"""Upgrades in each documented way, over and over, under readers: no error, and what is cached stays cached.

``make dist`` has built the wheels and the package. Each version is its own successor, so a roll back is the same. New
images are tried in ``tests/containers/test_keeper_containers.py``.
"""

import shutil
from collections.abc import Callable, Iterator
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
READERS, TIMES_UNDER_READERS = 8, 20
LONGEST_READ_S = 2.0
"""How long an upgrade of the package may hold up a read: docs/operations.md promises it."""
SERVICES = {"one service": "trimsfs@models", "two services": "trimsfs-keeper@models trimsfs-server@models"}
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


@pytest.mark.parametrize("services", SERVICES)
def test_upgrades_of_the_package_hold_up_no_read_of_many_for_long(
    system: BootedRoot, services: str, record_property: Callable[[str, object], None]
) -> None:
    units = SERVICES[services]
    system.run(f"systemctl start {units}; cmp /store/model /models/model")
    try:
        with system.reading("/models/model", count=READERS) as reads:
            for _ in range(TIMES_UNDER_READERS):
                system.run("""
                    before=$(pgrep -f '^trimsfs server')
                    dpkg --install /trimsfs.deb
                    test "$before" != "$(pgrep -f '^trimsfs server')"
                """)
    finally:
        system.run(f"mountctl down models; systemctl stop {units}")
    record_property("longest_s", reads.longest_s)
    print(f"{services}: {TIMES_UNDER_READERS} upgrades, the longest read took {reads.longest_s:.2f} s")
    assert reads.errors == []
    assert reads.fewest > 100
    assert reads.longest_s <= LONGEST_READ_S
