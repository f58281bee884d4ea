"""A store that refuses: what programs, commands and the operator are told, by real servers."""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.services import S3Server, put
from tests.services.ceph import Ceph
from tests.services.roles import of_ceph
from tests.services.seaweed import Seaweed
from tests.support.certificates import Authority
from tests.support.mounts import MountedStore, let_in, mountctl, mounted, trimsfs, unmount, wait_until
from tests.support.users import SERVER_USER, STRANGER, as_user
from trimsfs.mountinfo import mount_at

PROBLEM = "user.trims.problem"
OBJECTS = {f"{directory}/{name}": name.encode() for directory in ("m", "n") for name in ("a", "b")}


def problem(path: Path) -> str:
    return os.getxattr(path, PROBLEM).decode()


@dataclass(frozen=True, slots=True)
class WithSecret:
    """A mount whose credentials are in a file, which `use` writes."""

    mount: MountedStore
    use: Callable[[str], object]
    secret: str


@pytest.fixture
def with_secret(seaweed: Seaweed, tmp_path: Path) -> Iterator[WithSecret]:
    """A mount of a server that tells by code what is wrong with a signature."""
    with contextlib.closing(seaweed.client()) as client:
        client.create_bucket(Bucket="refuses")
    put(seaweed, "refuses", OBJECTS)
    file = tmp_path / "credentials"

    def use(secret: str) -> None:
        file.write_text(f"[default]\naws_access_key_id = {seaweed.access_key}\naws_secret_access_key = {secret}\n")
        file.chmod(0o644)

    use(seaweed.secret_key)
    environment = {name: value for name, value in seaweed.environment().items() if "_KEY" not in name}
    environment["AWS_SHARED_CREDENTIALS_FILE"] = str(file)
    with mounted(
        "s3://refuses", tmp_path, "--metadata-ttl", "1", "--prefetch", "off", environment=environment
    ) as mount:
        yield WithSecret(mount, use, seaweed.secret_key)


def test_a_wrong_secret_is_told_at_once_and_by_all(with_secret: WithSecret) -> None:
    mount = with_secret.mount
    assert sorted(os.listdir(mount.path / "m")) == ["a", "b"]
    with_secret.use("wrong")
    done = mountctl("restart", mount.path)

    assert done.returncode == 1, done.stdout
    assert "the store refuses: bucket refuses: ListObjectsV2: SignatureDoesNotMatch" in done.stderr
    assert "check the secret" in done.stderr
    done = mountctl("status", mount.path)
    assert (done.returncode, ": the store refuses: bucket refuses: " in done.stdout) == (1, True), done.stdout
    (told,) = json.loads(mountctl("status", "--json", mount.path).stdout)
    assert "SignatureDoesNotMatch" in told["store_problem"]
    done = trimsfs("status", mount.path)
    assert (done.returncode, "store       refuses, serving from the cache: " in done.stdout) == (1, True), done.stdout

    with pytest.raises(PermissionError):
        (mount.path / "m/a").read_bytes()
    assert mount.metrics()["trimsfs_store_failed_attempts_total"] >= 1
    time.sleep(1.1)  # --metadata-ttl
    done = trimsfs("ls", "--json", mount.path)
    assert done.returncode == 6, done.stderr
    assert f"trimsfs: {mount.path}: 1 directory not listed: the store refuses: bucket refuses: " in done.stderr
    assert [row["path"] for row in json.loads(done.stdout)] == [str(mount.path / "m")], "what is known"
    assert trimsfs("evict", mount.path).returncode == 0
    for who in (0, STRANGER):
        assert "SignatureDoesNotMatch" in as_user(who, lambda: problem(mount.path / "m/a"))

    with_secret.use(with_secret.secret)
    done = mountctl("restart", mount.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert trimsfs("status", mount.path).returncode == 0
    assert (mount.path / "m/a").read_bytes() == b"a"
    with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
        problem(mount.path / "m/a")


def test_a_key_that_lists_but_may_not_read_is_told(ceph: Ceph, tmp_path: Path) -> None:
    users = of_ceph(ceph, "list-only", OBJECTS, {}, {"lister": (), "reader": ("m/a",)}).users
    doctor = ("doctor", "--store", "s3://list-only", "--cache-dir", tmp_path / "cache", "gpu=off")
    done = trimsfs(*doctor, "passthrough=no", environment=users["lister"].environment())
    assert done.returncode == 1
    assert "FAIL  store: s3://list-only can be listed, but not read: m/a: bucket list-only: " in done.stdout
    assert "allow s3:GetObject" in done.stdout
    done = trimsfs(*doctor, "passthrough=no", environment=users["reader"].environment())
    assert "store: s3://list-only can be listed and read" in done.stdout

    with mounted("s3://list-only", tmp_path, environment=users["lister"].environment()) as mount:
        assert trimsfs("status", mount.path).returncode == 0
        with pytest.raises(PermissionError):
            (mount.path / "m/a").read_bytes()
        assert "GetObject" in problem(mount.path / "m/a")
        done = trimsfs("status", mount.path)
        assert (done.returncode, "every read so far was refused" in done.stdout) == (1, True), done.stdout

    with mounted("s3://list-only", tmp_path / "reads", environment=users["reader"].environment()) as mount:
        assert (mount.path / "m/a").read_bytes() == b"a"
        with pytest.raises(PermissionError):
            (mount.path / "m/b").read_bytes()
        assert "GetObject" in problem(mount.path / "m/b")  # of this object alone
        assert trimsfs("status", mount.path).returncode == 0
        with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
            problem(mount.path / "m/a")


def over_https(seaweed: Seaweed, ca_file: Path | None) -> dict[str, str]:
    server: S3Server = seaweed.over_https()
    environment = {name: value for name, value in server.environment().items() if "CA_BUNDLE" not in name}
    return environment | ({} if ca_file is None else {"AWS_CA_BUNDLE": str(ca_file)})


def mount_fails(directory: Path, environment: dict[str, str]) -> str:
    """What a mount that fails says."""
    mountpoint = directory / "models"
    places = ("--cache-dir", directory / "cache", "--log-file", directory / "log")
    done = trimsfs("mount", mountpoint, "--store", "s3://private", *places, environment=environment)
    unmount(mountpoint) if done.returncode == 0 else None
    assert done.returncode == 7, done.stderr
    assert (mount_at(mountpoint), mountpoint.exists()) == (None, False)
    return done.stderr


def test_a_private_ca_is_told_by_its_file_user_and_remedy(seaweed: Seaweed, tmp_path: Path) -> None:
    with contextlib.closing(seaweed.client()) as client:
        client.create_bucket(Bucket="private")
    put(seaweed, "private", {"a": b"a"})
    secret = tmp_path / "closed"
    secret.mkdir(mode=0o700)
    (secret / "ca.pem").write_bytes(seaweed.authority.read_bytes())

    untrusted = mount_fails(tmp_path, over_https(seaweed, None))
    assert "the certificate of 127.0.0.1 is not trusted by the CA file /" in untrusted
    assert "set AWS_CA_BUNDLE, or ca_bundle" in untrusted
    for file, reason in ((secret / "ca.pem", "Permission denied"), (tmp_path / "typo.pem", "No such file")):
        said = mount_fails(tmp_path, over_https(seaweed, file))
        assert f"CA file {file}: {reason}" in said
        assert f"user {SERVER_USER}" in said
        assert "network" not in said + untrusted
        doctor = ("doctor", "--store", "s3://private", "--cache-dir", tmp_path / "cache", "gpu=off")
        done = trimsfs(*doctor, "passthrough=no", environment=over_https(seaweed, file))
        line = next(line for line in done.stdout.splitlines() if "store:" in line)
        assert line.startswith(f"FAIL  store: CA file {file}: ") or f"CA file {file}: {reason}" in line
        assert "network" not in line
    with mounted("s3://private", tmp_path, environment=over_https(seaweed, seaweed.authority)) as mount:
        assert (mount.path / "a").read_bytes() == b"a"
    wait_until(lambda: mount_at(tmp_path / "models") is None)


def test_a_ca_file_that_is_lost_is_told_by_all_and_used_again_once_it_is_back(seaweed: Seaweed, tmp_path: Path) -> None:
    with contextlib.closing(seaweed.client()) as client:
        client.create_bucket(Bucket="rotated")
    put(seaweed, "rotated", OBJECTS)
    place, declared, file = tmp_path / "models", tmp_path / "mounts.d", tmp_path / "ca.pem"
    declared.mkdir()
    text = f'mountpoint = "{place}"\nstore = "s3://rotated"\nlog_file = "{tmp_path / "log"}"\nprefetch = "off"\n'
    (declared / "models.toml").write_text(f'{text}cache_dir = "{tmp_path / "cache"}"\n')
    environment = over_https(seaweed, file) | {"TRIMSFS_MOUNTS_DIR": str(declared)}
    let_in(tmp_path)
    done = mountctl("up", environment=environment)
    assert (done.returncode, f"CA file {file}: No such file" in done.stderr) == (7, True), done.stderr
    assert "--wait-for-store" not in done.stderr
    lost = f"mountctl: models: the store does not answer: CA file {file}: No such file or directory: user "
    try:
        file.write_bytes(seaweed.authority.read_bytes())
        done = mountctl("up", environment=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert (place / "m/a").read_bytes() == b"a"
        file.rename(tmp_path / "away")
        done = mountctl("restart", "models", environment=environment)
        assert (done.returncode, done.stderr.startswith(lost)) == (1, True), done.stderr
        assert (place / "m/a").read_bytes() == b"a"
        assert mountctl("down", "--everywhere", "models", environment=environment).returncode == 0
        file.write_bytes(Authority(declared).certificate.read_bytes())
        done = mountctl("up", environment=environment)
        assert (done.returncode, f"is not trusted by the CA file {file}" in done.stderr) == (1, True), done.stderr
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            (place / "m/b").read_bytes()
        (tmp_path / "away").rename(file)
        wait_until(lambda: trimsfs("status", place).returncode == 0)
        assert (place / "m/b").read_bytes() == b"b"
    finally:
        unmount(place)


def test_a_prefix_with_nothing_under_it_is_told_by_all(seaweed: Seaweed, tmp_path: Path) -> None:
    with contextlib.closing(seaweed.client()) as client:
        client.create_bucket(Bucket="empty")
    put(seaweed, "empty", {"models/a": b"a"})
    place, declared = tmp_path / "made" / "models", tmp_path / "mounts.d"
    declared.mkdir()
    text = f'mountpoint = "{place}"\ncache_dir = "{tmp_path / "cache"}"\nlog_file = "{tmp_path / "log"}"\n'
    (declared / "models.toml").write_text(f'store = "s3://empty/typo"\n{text}')
    environment = seaweed.environment() | {"TRIMSFS_MOUNTS_DIR": str(declared)}
    told = "s3://empty/typo: there is nothing under it: check the spelling if you expect objects"
    try:
        for _ in ("mounts", "is up"):
            done = mountctl("up", environment=environment)
            assert (done.returncode, f"mountctl: models: {told}" in done.stderr) == (0, True), done.stderr
        done = mountctl("restart", "models", environment=environment)
        assert (done.returncode, f"mountctl: models: {told}" in done.stderr) == (0, True), done.stderr
        done = mountctl("status", "models", environment=environment)
        assert (done.returncode, told in done.stdout) == (0, True), done.stdout
        done = trimsfs("status", place)
        assert (done.returncode, told in done.stdout) == (0, True), done.stdout
        put(seaweed, "empty", {"typo/b": b"b"})
        assert trimsfs("refresh", place).returncode == 0
        assert os.listdir(place) == ["b"]
        assert "nothing under it" not in trimsfs("status", place).stdout
    finally:
        unmount(place)

    (declared / "models.toml").write_text(f'store = "s3://no-such-bucket"\n{text.replace("made", "other")}')
    done = mountctl("up", environment=environment)
    assert done.returncode == 5, done.stderr
    assert not (tmp_path / "other").exists(), "what was made is removed"
