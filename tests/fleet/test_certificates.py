"""A mount whose certificate other members would not accept, or that is gone."""

import subprocess
from pathlib import Path

from tests.support.certificates import Authority, Identity
from tests.support.keepers import kill
from tests.support.mounts import MOUNTCTL, MountedStore, let_in, mounted, trimsfs, wait_until

MEMBER = "127.0.0.1:7443"


def in_a_fleet(authority: Authority, identity: Identity) -> tuple[str | Path, ...]:
    """The options of a mount in a fleet."""
    places = ("fleet=tests", f"fleet_members={MEMBER}", f"fleet_listen={MEMBER}")
    files = (f"fleet_ca={authority.certificate}", f"fleet_cert={identity.certificate}", f"fleet_key={identity.key}")
    return *places, *files


def restart(mount: MountedStore) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([MOUNTCTL, "restart", mount.path], capture_output=True, text=True, timeout=60, check=False)


def test_a_mount_tells_that_its_certificate_has_expired(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "file").write_bytes(b"content")
    let_in(tmp_path)
    authority = Authority(tmp_path)
    identity = authority.identity("127.0.0.1", days=-1)
    with mounted(store_directory, tmp_path / "mounted", *in_a_fleet(authority, identity)) as mount:
        assert (mount.path / "file").read_bytes() == b"content"
        told = f"fleet: other members refuse this host: option fleet_cert {identity.certificate}: certificate has exp"
        assert f" WARNING trimsfs.extras.fleet.fleet_plugin: {told}" in mount.log()


def test_a_mount_outlives_its_certificate(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "file").write_bytes(b"content")
    let_in(tmp_path)
    authority = Authority(tmp_path)
    identity = authority.identity("127.0.0.1")
    with mounted(store_directory, tmp_path / "mounted", *in_a_fleet(authority, identity)) as mount:
        away = identity.certificate.rename(tmp_path / "away")
        told = f"option fleet_cert {identity.certificate}: No such file or directory"
        done = restart(mount)
        assert (done.returncode != 0, told in done.stderr) == (True, True), done.stderr
        assert trimsfs("status", mount.path).returncode == 0
        for _ in range(3):
            kill(mount)
            assert (mount.path / "file").read_bytes() == b"content"
            trimsfs("evict", mount.path)
        wait_until(lambda: told in mount.log(), 20)
        status = trimsfs("status", mount.path)
        assert (status.returncode, f"  fleet       this host fetches alone: {told}" in status.stdout) == (1, True)
        away.rename(identity.certificate)
        done = restart(mount)
        assert done.returncode == 0, done.stderr
        status = trimsfs("status", mount.path)
        assert (status.returncode, "  fleet       tests, 1 member" in status.stdout) == (0, True), status.stdout
