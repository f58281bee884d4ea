"""Local copies of a bucket's objects are compared with the store, checked and mended, while the mount is in use."""

import contextlib
import mmap
import os
import random
from pathlib import Path

import pytest

from tests.services import S3Server
from tests.services.ceph import Ceph
from tests.support.mounts import MountedStore, mounted, trimsfs, wait_until
from tests.support.parts import blob_files, flip_byte
from tests.support.signing import new_key, pem, sign
from tests.support.users import STRANGER, as_user

MIB = 1 << 20
CONTENT = random.Random(5).randbytes(20 * MIB + 77)


def put(server: S3Server, bucket: str, **how: object) -> None:
    with contextlib.closing(server.client()) as client:
        client.put_object(Bucket=bucket, Key="model", Body=CONTENT, **how)  # type: ignore[arg-type]


def blob(mount: MountedStore) -> Path:
    (file,) = blob_files(mount.cache)
    return file


def test_a_whole_copy_is_compared_with_the_etag(ceph: Ceph, bucket: str, tmp_path: Path) -> None:
    put(ceph, bucket)
    with mounted(f"s3://{bucket}", tmp_path, environment=ceph.environment()) as mount:
        assert (mount.path / "model").read_bytes() == CONTENT
        wait_until(lambda: mount.info("model")["verified"], timeout_s=60)
        assert mount.info("model")["digest"].startswith("md5:")
        assert mount.metrics()["trimsfs_integrity_compared_total"] == 1


@pytest.mark.parametrize("algorithm", ["CRC32C", "CRC64NVME"])
def test_a_whole_copy_is_compared_with_the_checksum_before_it_is_read(
    moto: S3Server, tmp_path: Path, algorithm: str
) -> None:
    name = f"digests-{algorithm.lower()}"
    with contextlib.closing(moto.client()) as client:
        client.create_bucket(Bucket=name)
    put(moto, name, ChecksumAlgorithm=algorithm)
    with (
        mounted(f"s3://{name}", tmp_path, "--cold-open", "wait", environment=moto.environment()) as mount,
        (mount.path / "model").open("rb") as file,
    ):
        assert mount.info("model")["verified"]
        assert mount.info("model")["digest"].startswith(f"{algorithm.lower()}:")
        assert file.read() == CONTENT


@pytest.mark.parametrize("options", [(), ("passthrough=no",)], ids=["passthrough", "cached"])
def test_damage_is_found_by_verify_and_mended_while_it_is_mapped(
    ceph: Ceph, bucket: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    put(ceph, bucket)
    with mounted(f"s3://{bucket}", tmp_path, *options, environment=ceph.environment()) as mount:
        with (mount.path / "model").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
            assert mapping[:] == CONTENT
            good = trimsfs("verify", mount.path)
            assert (good.returncode, good.stderr) == (0, "")
            assert mount.info("model")["verified"]
            assert good.stdout.startswith(f"{mount.path}: verified 1 file, ")
            flip_byte(blob(mount), 9 * MIB)
            bad = trimsfs("verify", mount.path / "model")
            assert bad.returncode == 18
            assert bad.stderr == f"trimsfs: {mount.path / 'model'}: local copy was damaged, chunks refetched: 1\n"
            assert mapping[:] == CONTENT
        assert trimsfs("verify", mount.path).returncode == 0
        assert blob(mount).read_bytes() == CONTENT
        assert "model: chunk 1 is damaged in the cache: refetching" in mount.log()


def test_what_programs_have_seen_wrong_they_see_right_once_it_is_mended(store_directory: Path, tmp_path: Path) -> None:
    (store_directory / "model").write_bytes(CONTENT)
    with mounted(store_directory, tmp_path, "passthrough=no") as mount:
        path = mount.path / "model"
        assert trimsfs("warm", path).returncode == 0
        flip_byte(blob(mount), 9 * MIB)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[:] != CONTENT
            assert trimsfs("verify", path).returncode == 18
            assert mapped[:] == CONTENT
        assert path.read_bytes() == CONTENT
        assert trimsfs("verify", path).returncode == 0


def test_scrubbing_finds_damage_by_itself(ceph: Ceph, bucket: str, tmp_path: Path) -> None:
    put(ceph, bucket)
    options = ("scrub_interval=0.5", "scrub_rate=1GiB")
    with mounted(f"s3://{bucket}", tmp_path, *options, environment=ceph.environment()) as mount:
        assert trimsfs("warm", mount.path).returncode == 0
        flip_byte(blob(mount), 3 * MIB)
        wait_until(lambda: mount.metrics()["trimsfs_integrity_repaired_chunks_total"] >= 1, timeout_s=60)
        assert blob(mount).read_bytes() == CONTENT
        assert (mount.path / "model").read_bytes() == CONTENT


def test_only_what_has_been_signed_can_be_opened(store_directory: Path, tmp_path: Path) -> None:
    key = new_key()
    (tmp_path / "key.pem").write_bytes(pem(key))
    (tmp_path / "key.pem").chmod(0o600)  # the server reads it before it gives root up
    files = {"params": CONTENT, "deep/config.json": b"{}"}
    for model in ("signed", "changed", "unsigned"):
        for name, content in files.items():
            path = store_directory / model / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if model != "unsigned":
            (store_directory / model / "model.sig").write_bytes(sign(key, files))
    (store_directory / "changed/params").write_bytes(CONTENT[:-1] + b"?")
    options = ("signatures=require", f"signing_key={tmp_path}/key.pem", "--cold-open", "wait")
    with mounted(store_directory, tmp_path, *options) as mount:
        for name, content in files.items():
            assert (mount.path / "signed" / name).read_bytes() == content
        assert mount.info("signed/params")["passthrough"]
        assert (mount.path / "changed/deep/config.json").read_bytes() == b"{}"
        for name in (
            "changed/params",
            "unsigned/params",
            "unsigned/deep/config.json",
            "unsigned/.trims/params/tensors",
        ):
            with pytest.raises(PermissionError):
                (mount.path / name).read_bytes()
        assert mount.metrics()["trimsfs_signatures_refusals_total"] == 4
        for who in (0, STRANGER):
            told = as_user(who, lambda: os.getxattr(mount.path / "unsigned/params", "user.trims.problem"))
            assert told.startswith(b"unsigned/params: no model.sig in any directory above it")
        for name, exit_code in (("signed/params", 0), ("changed/params", 19), ("unsigned", 19)):
            assert trimsfs("warm", mount.path / name).returncode == exit_code
            assert trimsfs("pin", "--best-effort", mount.path / name).returncode == exit_code
        assert "changed/params: digest differs from the signed one" in mount.log()
        assert "unsigned/params: no model.sig in any directory above it" in mount.log()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("signatures=check",), "option signatures check: needs the public key: set signing_key"),
        (("signatures=check", "signing_key=/absent"), "option signing_key /absent: No such file or directory"),
        (
            ("signatures=check", "signing_key=/dev/null", "--digests", "off"),
            "option signatures check: needs digests: leave out --digests off",
        ),
    ],
)
def test_keys_that_cannot_be_used_are_told(
    store_directory: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "models").mkdir()
    done = trimsfs(
        "mount", tmp_path / "models", "--store", store_directory, "--cache-dir", tmp_path / "cache", *options
    )
    assert (done.returncode, done.stderr) == (2, f"trimsfs: {message}\n")
