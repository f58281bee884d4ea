"""Two tenants with roles of their own on one mount of a bucket."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services.roles import CLOSED, Authorising, of_ceph, of_moto
from tests.support.keepers import kill
from tests.support.mounts import MountedStore, log_beside, mounted, trimsfs, wait_until
from tests.support.users import STRANGER, as_user

BUCKET = "tenants"
MINE, BOTH = os.urandom(9 << 20), os.urandom(2 << 20)
OBJECTS = {"shared/for-a": MINE, "shared/both": BOTH, "team-a/model": MINE, "team-b/model": BOTH}
ROLES = {"a": ["shared/*", "team-a/*"], "b": ["shared/both", "team-b/*"], "narrow": ["shared/*"], CLOSED: ["*"]}
TTL = ("--metadata-ttl", "0.5")


@pytest.fixture(scope="module", params=["ceph", "moto"])
def roles(request: pytest.FixtureRequest) -> Iterator[Authorising]:
    """The bucket at Ceph, a real S3 server, and at moto, which emulates AWS's."""
    users = {"c": ["team-a/*"]}
    if request.param == "ceph":
        yield of_ceph(request.getfixturevalue("ceph"), BUCKET, OBJECTS, ROLES, users)
    else:
        with of_moto(BUCKET, OBJECTS, ROLES, users) as found:
            yield found


def at_two_paths(file: Path, roles: Authorising, extra: str = "", **of: str) -> Path:
    """The same part of the bucket at ``/a`` and ``/b``, each with a role."""
    text = ""
    for path in ("a", "b"):
        text += f'[[store]]\npath = "{path}"\nstore = "s3://{BUCKET}/shared"\naddressing_style = "path"\n'
        text += f'[[tenants]]\npath = "{path}"\nrole_arn = "{roles.arn(of.get(path, path))}"\n{extra}\n'
    file.write_text(text)
    return file


PROBLEM = "user.trims.problem"


def refused(path: Path) -> bool:
    """Whether it gives EACCES, and no other error."""
    try:
        path.read_bytes()
    except PermissionError:
        return True
    return False


def fetched(mount: MountedStore) -> int:
    return int(mount.metrics()["trimsfs_fetch_fetched_bytes_total"])


def test_tenants_of_one_bucket_read_their_own_with_their_own_role(roles: Authorising, tmp_path: Path) -> None:
    """The operator, whose role lists the bucket, may read no object."""
    file = tmp_path / "models.toml"
    tenants = "".join(f'[[tenants]]\npath = "team-{t}"\nrole_arn = "{roles.arn(t)}"\n' for t in "ab")
    file.write_text(f'store = "s3://{BUCKET}"\naddressing_style = "path"\n{tenants}')
    with mounted(None, tmp_path / "mount", "--config", file, environment=roles.server.environment()) as mount:
        assert sorted(os.listdir(mount.path)) == ["shared", "team-a", "team-b"]
        assert (mount.path / "team-a/model").read_bytes() == MINE
        assert (mount.path / "team-b/model").read_bytes() == BOTH
        assert refused(mount.path / "shared/both")
        kill(mount)
        assert (mount.path / "team-a/model").read_bytes() == MINE
        assert fetched(mount) == 0
        status = trimsfs("status", mount.path).stdout
        assert f"/team-a: s3://{BUCKET}, tenant team-a: " in status


@pytest.mark.parametrize("extra", ["", "share_cache = true"], ids=["apart", "shared"])
def test_no_tenant_reads_what_another_may_by_any_way(roles: Authorising, tmp_path: Path, extra: str) -> None:
    file = at_two_paths(tmp_path / "models.toml", roles, extra)
    with mounted(None, tmp_path / "mount", "--config", file, environment=roles.server.environment()) as mount:
        assert refused(mount.path / "b/for-a"), "by the store"
        assert (mount.path / "a/for-a").read_bytes() == MINE
        before = fetched(mount)
        for _ in range(3):
            assert refused(mount.path / "b/for-a"), "by the cache"
            assert refused(mount.path / "b/.trims/for-a/info")
            assert refused(mount.path / "b/.trims/for-a/tensors")
        assert "AccessDenied" in as_user(STRANGER, lambda: os.getxattr(mount.path / "b/for-a", PROBLEM)).decode()
        for name in ("residency", "digest", "etag", "tensors"):
            with pytest.raises(OSError, match="Permission") as raised:
                os.getxattr(mount.path / "b/for-a", f"user.trims.{name}")
            assert raised.value.errno == errno.EACCES
        kill(mount)
        assert refused(mount.path / "b/for-a"), "by the next server's cache"
        assert (mount.path / "a/for-a").read_bytes() == MINE
        assert fetched(mount) <= 2, "only what shows the right"
        assert before >= len(MINE)
        seen = as_user(STRANGER, (mount.path / ".trims/metrics").read_text)
        assert "trimsfs_store_requests_total" in seen
        assert '{store="' not in seen
        secret = roles.server.secret_key
        assert secret not in mount.log()
        assert secret not in json.dumps(mount.control())


def test_a_cache_that_is_apart_tells_nothing_of_other_tenants(roles: Authorising, tmp_path: Path) -> None:
    file = at_two_paths(tmp_path / "models.toml", roles)
    with mounted(None, tmp_path / "mount", "--config", file, environment=roles.server.environment()) as mount:
        assert (mount.path / "a/both").read_bytes() == BOTH
        assert mount.info("b/both")["residency"]["disk"] == 0
        assert (mount.path / "b/both").read_bytes() == BOTH
        assert fetched(mount) >= 2 * len(BOTH), "as if the other had not read it"


def test_tenants_that_share_have_one_copy_on_the_host(roles: Authorising, tmp_path: Path) -> None:
    file = at_two_paths(tmp_path / "models.toml", roles, "share_cache = true")
    with mounted(None, tmp_path / "mount", "--config", file, environment=roles.server.environment()) as mount:
        assert (mount.path / "a/both").read_bytes() == BOTH
        assert (mount.path / "b/both").read_bytes() == BOTH
        assert len(BOTH) <= fetched(mount) < 2 * len(BOTH)
        assert mount.metrics()["trimsfs_disk_used_bytes"] == len(BOTH)


def test_a_right_that_is_withdrawn_ends_with_the_ttl(roles: Authorising, tmp_path: Path) -> None:
    file = at_two_paths(tmp_path / "models.toml", roles, a="narrow")
    with mounted(None, tmp_path / "mount", *TTL, "--config", file, environment=roles.server.environment()) as mount:
        assert (mount.path / "a/for-a").read_bytes() == MINE
        with (mount.path / "a/for-a").open("rb") as open_before:
            roles.may_read("narrow", "shared/both")
            try:
                wait_until(lambda: refused(mount.path / "a/for-a"), timeout_s=10)
                assert (mount.path / "a/both").read_bytes() == BOTH
                assert open_before.read() == MINE, "what is open stays open"
            finally:
                roles.may_read("narrow", "shared/*")
        wait_until(lambda: not refused(mount.path / "a/for-a"), timeout_s=10)


def test_a_tenant_whose_role_is_refused_does_not_hinder_others(roles: Authorising, tmp_path: Path) -> None:
    file = at_two_paths(tmp_path / "models.toml", roles, a=CLOSED)
    with mounted(None, tmp_path / "mount", "--config", file, environment=roles.server.environment()) as mount:
        assert (mount.path / "b/both").read_bytes() == BOTH
        with pytest.raises(OSError, match="Permission"):
            os.listdir(mount.path / "a")
        assert "tenant a: the store refuses its credentials: " in log_beside(mount.path.parent).read_text()


def test_a_tenant_has_a_profile_of_its_own(roles: Authorising, tmp_path: Path) -> None:
    keys = roles.users["c"]
    credentials = tmp_path / "credentials"
    credentials.write_text(f"[c]\naws_access_key_id = {keys.access_key}\naws_secret_access_key = {keys.secret_key}\n")
    file = tmp_path / "models.toml"
    file.write_text(
        f'store = "s3://{BUCKET}"\naddressing_style = "path"\n[[tenants]]\npath = "team-a"\nprofile = "c"\n'
        '[[tenants]]\npath = "team-b"\nprofile = "c"\n'
    )
    environment = roles.server.environment() | {"AWS_SHARED_CREDENTIALS_FILE": str(credentials)}
    with mounted(None, tmp_path / "mount", "--config", file, environment=environment) as mount:
        assert (mount.path / "team-a/model").read_bytes() == MINE
        assert refused(mount.path / "team-b/model")
