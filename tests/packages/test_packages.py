"""Wheel, Debian package and image: from a clean Debian without a compiler to a model that is read through a mount.

``make dist`` has built them.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import trimsfs
from tests.containers.engines import Podman
from tests.packages.roots import DIST, WHEELHOUSE, Root, built, make_root

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(1800)]


@contextmanager
def measured(record: Callable[[str, object], None], artefact: Path) -> Iterator[None]:
    """Print and record the seconds that the block takes, and the size of what it tries."""
    began = time.monotonic()
    yield
    seconds, megabytes = round(time.monotonic() - began, 1), round(artefact.stat().st_size / 1e6, 1)
    record("seconds", seconds)
    record("megabytes", megabytes)
    print(f"{artefact.name}: {seconds} s, {megabytes} MB")


def test_wheel_mounts_for_root_and_users_without_a_compiler(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    root = make_root(tmp_path / "root", "python3-venv", "fuse3")
    shutil.copytree(WHEELHOUSE, root.path / "wheelhouse")
    with measured(record_property, next(WHEELHOUSE.glob("trimsfs-*.whl"))):
        said = root.run("""
            python3 -m venv /opt/trimsfs
            . /opt/trimsfs/bin/activate
            pip install -q --no-index --find-links /wheelhouse trimsfs
            trimsfs mount /store /models
            cmp /store/model /models/model
            cat /proc/[0-9]*/maps | grep -o '/[^ ]*libfuse3[^ ]*' | sort -u      # one, of the wheel
            trimsfs doctor --store /store | grep libfuse
            trimsfs umount /models
            ln -s /proc/self/mounts /etc/mtab
            echo user:x:1000:1000::/home/user:/bin/sh >> /etc/passwd
            install -d -o 1000 /home/user /home/user/models
            as_user() { setpriv --reuid 1000 --regid 1000 --clear-groups env HOME=/home/user "$@"; }
            as_user trimsfs mount /store /home/user/models
            as_user cmp /store/model /home/user/models/model
            as_user trimsfs umount /home/user/models
            test -z "$(findmnt -t fuse.trimsfs)"
        """)
    assert said.count("/trimsfs.libs/libfuse3-") == 1
    assert "ok    libfuse: libfuse 3." in said


def test_wheels_say_what_they_contain() -> None:
    for wheel in DIST.glob(f"trimsfs-{trimsfs.__version__}-*.whl"):
        assert wheel.name.endswith("-manylinux_2_28_x86_64.whl")
        assert {"trimsfs", "pyfuse3", "libfuse"} == components(wheel.with_suffix(".cdx.json"))


def components(bill: Path) -> set[str]:
    """The names in a bill of materials."""
    document = json.loads(bill.read_text())
    assert document["metadata"]["component"]["version"] == trimsfs.__version__
    return {component["name"] for component in document["components"]}


@pytest.fixture
def declared(tmp_path: Path) -> Root:
    """A Debian with systemd and the package's file, and what will be declared."""
    root = make_root(tmp_path / "root", "procps", "systemd-sysv")
    shutil.copy(built("trimsfs_*.deb"), root.path / "trimsfs.deb")
    (root.path / "models.toml").write_text('mountpoint = "/models"\nstore = "/store"\n')
    return root


def test_debian_package_serves_and_leaves_nothing_behind(
    declared: Root, record_property: Callable[[str, object], None]
) -> None:
    with declared.booted() as system:
        system.run("apt-get -q update")
        with measured(record_property, built("trimsfs_*.deb")):
            system.run("""
                apt-get -q -y install --no-install-recommends /trimsfs.deb
                cp /models.toml /etc/trimsfs/mounts.d
                systemctl enable --now trimsfs@models
                cmp /store/model /models/model
            """)
        system.run("""
            trimsfs status
            test -d /run/cdi -a -z "$(python3 -c 'import importlib.util as u; print(u.find_spec("boto3") or "")')"
            grep -F '"/usr/bin/mountctl"' /usr/share/containers/oci/hooks.d/trimsfs.json
            test "$(ps -o user= -p "$(pgrep -f '^trimsfs server')")" = trimsfs
            before=$(pgrep -f '^trimsfs server')
            exec 3< /models/model
            dpkg --install /trimsfs.deb                # an upgrade: another server, and the open file reads on
            cmp /store/model - <&3
            test "$before" != "$(pgrep -f '^trimsfs server')"
        """)
        system.run("""
            apt-get -q -y remove trimsfs
            test -z "$(findmnt -t fuse.trimsfs)"
            test -z "$(pgrep -f ^trimsfs)"
            test ! -e /run/trimsfs -a ! -e /usr/lib/trimsfs
            test -e /etc/trimsfs/mounts.d/models.toml -a -d /var/cache/trimsfs
            apt-get -q -y purge trimsfs
        """)
        left = system.run("find / -xdev -name '*trimsfs*' -not -path '/proc/*' -not -path '/trimsfs.deb'")
    assert left == ""
    named = components(built("trimsfs-{version}-deb.cdx.json"))
    assert {"trimsfs", "libfuse", "pyfuse3", "boto3", "huggingface_hub"} <= named


def test_mount_by_hand_is_gone_with_the_package_and_its_open_file_reads_on(declared: Root) -> None:
    declared.run("""
        apt-get -q update
        apt-get -q -y install --no-install-recommends /trimsfs.deb
        mount -t trimsfs /store /models
        exec 3< /models/model
        apt-get -q -y remove trimsfs
        test -z "$(findmnt -t fuse.trimsfs)"
        cmp /store/model - <&3
    """)


def test_image_mounts(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    archive = built("trimsfs-{version}-image.tar")
    podman = Podman(tmp_path / "podman", image=f"localhost/trimsfs:{trimsfs.__version__}")
    store = tmp_path / "store"
    store.mkdir()
    (store / "model").write_bytes(b"model" * 100_000)
    podman.configure()
    script = "mkdir /models; trimsfs mount /store /models; cmp /store/model /models/model; trimsfs umount /models"
    with measured(record_property, archive):
        done = podman("load", "--input", archive)
        assert done.returncode == 0, done.stderr
        podman.run("--privileged", "-v", f"{store}:/store:ro", command=["sh", "-euc", script])
    named = components(built("trimsfs-{version}-image.cdx.json"))
    assert {"trimsfs", "libfuse", "grpcio", "huggingface_hub", "libc6"} <= named
