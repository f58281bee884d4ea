"""A mount whose certificate other members would not accept."""

from pathlib import Path

from tests.fleet.certificates import Authority
from tests.support.mounts import let_in, mounted


def test_a_mount_tells_that_its_certificate_has_expired(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "file").write_bytes(b"content")
    let_in(tmp_path)
    authority = Authority(tmp_path)
    identity = authority.identity("127.0.0.1", days=-1)
    member = "127.0.0.1:7443"
    files = ("--fleet-ca", authority.certificate, "--fleet-cert", identity.certificate, "--fleet-key", identity.key)
    places = ("--fleet", "tests", "--fleet-members", member, "--fleet-listen", member)
    with mounted(store_directory, tmp_path / "mounted", *places, *files) as mount:
        assert (mount.path / "file").read_bytes() == b"content"
        told = f"fleet: other members refuse this host: option --fleet-cert {identity.certificate}: certificate has exp"
        assert f" WARNING trimsfs.server.daemon: {told}" in mount.log()
