"""A bucket of a real S3 server, mounted."""

import contextlib
import errno
import hashlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from tests.services import put
from tests.services.ceph import Ceph
from tests.services.link import start_link
from tests.services.switch import switched
from tests.support.mounts import mounted, trimsfs, wait_until
from trimsfs.fetch.bypass import MOST_SHARE
from trimsfs.mountinfo import mount_at

MIB = 1 << 20
GIB = 1 << 30
FETCH_PROCESSES = 2
RATE = 2 * MIB
"""Bytes a second of each connection to a slow store: a chunk takes four seconds."""


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("size", [GIB // 16, pytest.param(GIB, marks=pytest.mark.slow)])
def test_an_object_read_by_32_cold_readers_at_once_is_exact_and_fetched_once(
    ceph: Ceph, bucket: str, tmp_path: Path, size: int
) -> None:
    content = random.Random(1).randbytes(16 * MIB) * (size // (16 * MIB))
    put(ceph, bucket, {"models/big": content})
    options = ("--cold-open", "wait")
    with mounted(f"s3://{bucket}/models", tmp_path, *options, environment=ceph.environment()) as mount:
        readers = [
            subprocess.Popen(["sha256sum", mount.path / "big"], stdout=subprocess.PIPE, text=True) for _ in range(32)
        ]
        digests = {reader.communicate(timeout=200)[0].split()[0] for reader in readers}

        assert digests == {sha256(content)}
        requests, sent = ceph.bytes_sent(bucket, "models/big")
        assert sent == size
        assert size // (32 * MIB) <= requests <= size // (8 * MIB)
        assert trimsfs("verify", mount.path / "big").returncode == 0  # at once, and not when it is at rest
        assert mount.info("big")["verified"]
        assert mount.info("big")["digest"].startswith("md5:")
        status = Path(f"/proc/{mount.control()['server_pid']}/status").read_text()
        anonymous_kib = int(status.partition("RssAnon:")[2].split()[0])
        assert anonymous_kib < 200 * 1024


def test_300_small_objects_are_exact_and_fetched_once(ceph: Ceph, bucket: str, tmp_path: Path) -> None:
    draw = random.Random(2)
    objects = {f"small/{number:03}": draw.randbytes(32 * 1024 + number) for number in range(300)}
    put(ceph, bucket, objects)
    options = [f"fetch_processes={FETCH_PROCESSES}"]
    with mounted(f"s3://{bucket}", tmp_path, *options, environment=ceph.environment()) as mount:
        for _ in range(2):
            for key, content in objects.items():
                assert (mount.path / key).read_bytes() == content
        assert mount.metrics()["trimsfs_fetch_fetched_bytes_total"] == sum(map(len, objects.values()))
        listings = [op for op in ceph.ops() if op.bucket == bucket and op.operation.startswith("list_bucket")]
        # Two when the mount is made, one by each fetch process as it starts, and those of the directories.
        assert len(listings) <= 4 + FETCH_PROCESSES


def test_small_files_of_a_directory_are_fetched_ahead(ceph: Ceph, bucket: str, tmp_path: Path) -> None:
    objects = {f"model/{number:03}": random.Random(number).randbytes(1000 + number) for number in range(40)}
    put(ceph, bucket, objects)
    with mounted(f"s3://{bucket}", tmp_path, environment=ceph.environment()) as mount:

        def fetched() -> float:
            return mount.metrics()["trimsfs_fetch_fetched_chunks_total"]

        (mount.path / "model/000").read_bytes()
        wait_until(lambda: fetched() == 33)  # it and the next 32
        for key, content in objects.items():
            assert (mount.path / key).read_bytes() == content
        assert fetched() == 40


def recorded_bytes(cache: Path) -> int:
    """What the index of a cache directory says is on disk, also while its server runs."""
    with contextlib.closing(sqlite3.connect(cache / "index.sqlite")) as index:
        recorded: int = index.execute("SELECT coalesce(sum(bytes), 0) FROM chunks").fetchone()[0]
    return recorded


def test_server_killed_while_fetching_loses_no_recorded_chunk_and_no_byte_is_wrong(
    ceph: Ceph, bucket: str, tmp_path: Path
) -> None:
    content = b"".join(random.Random(seed).randbytes(64 * MIB) for seed in range(4))
    put(ceph, bucket, {"big": content})
    with start_link(ceph, latency_ms=0, rate=RATE) as slow:
        with mounted(f"s3://{bucket}", tmp_path, environment=slow.environment()) as mount:
            reader = subprocess.Popen(["cat", mount.path / "big"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            wait_until(lambda: recorded_bytes(mount.cache) > 0, timeout_s=30, tolerate=sqlite3.Error)
            facts = mount.control()
            for who in ("keeper_pid", "server_pid"):  # and nobody goes on
                os.kill(facts[who], signal.SIGKILL)
            assert reader.wait(20) != 0
            trimsfs("umount", "--lazy", mount.path)
        recorded = recorded_bytes(mount.cache)
        assert 0 < recorded < len(content)
        with mounted(f"s3://{bucket}", tmp_path, environment=slow.environment()) as mount:
            assert sha256((mount.path / "big").read_bytes()) == sha256(content)
            metrics = mount.metrics()

    # First bytes may be asked for beside their chunk.
    again = metrics["trimsfs_fetch_fetched_bytes_total"] - (len(content) - recorded)
    assert 0 <= again <= MOST_SHARE * len(content)
    assert metrics["trimsfs_disk_corrupt_chunks_total"] == 0


def test_cached_bytes_that_changed_on_disk_are_fetched_again(ceph: Ceph, bucket: str, tmp_path: Path) -> None:
    content = random.Random(4).randbytes(20 * MIB)
    put(ceph, bucket, {"model": content})
    options = ("--cold-open", "wait")
    with mounted(f"s3://{bucket}", tmp_path, *options, environment=ceph.environment()) as mount:
        assert (mount.path / "model").read_bytes() == content
        token = mount.info("model")["generation"]
    blob = mount.cache / "blobs" / token[:2] / token
    with blob.open("r+b") as file:
        file.seek(9 * MIB)
        file.write(b"damage")
    with mounted(f"s3://{bucket}", tmp_path, *options, environment=ceph.environment()) as mount:
        assert (mount.path / "model").read_bytes() == content
        metrics = mount.metrics()

    assert metrics["trimsfs_disk_corrupt_chunks_total"] == 1
    assert metrics["trimsfs_fetch_fetched_bytes_total"] == 8 * MIB


@pytest.mark.parametrize(
    ("store", "environment", "options", "code", "message"),
    [
        ("s3://absent-bucket", {}, (), 5, "bucket absent-bucket does not exist"),
        ("s3://{bucket}", {"AWS_SECRET_ACCESS_KEY": "wrong"}, (), 6, "check the credentials"),
        ("s3://{bucket}", {"AWS_ACCESS_KEY_ID": "unknown"}, (), 6, "check the credentials"),
        ("s3://{bucket}", {}, ("--anonymous",), 6, "check the credentials"),
        ("s3://{bucket}", {}, ("--profile", "absent"), 2, "profile (absent) could not be found"),
        (
            "s3://{bucket}",
            {},
            ("--endpoint-url", "http://127.0.0.1:{dead}", "--retry-deadline", "1"),
            7,
            "127.0.0.1:{dead}",
        ),
        ("s3://{bucket}", {}, ("--endpoint-url", "nonsense"), 2, "nonsense"),
    ],
)
def test_store_that_cannot_be_used_gives_one_line_and_its_exit_code(
    ceph: Ceph,
    bucket: str,
    store: str,
    environment: dict[str, str],
    options: tuple[str, ...],
    code: int,
    message: str,
    tmp_path: Path,
) -> None:
    mountpoint = tmp_path / "models"
    mountpoint.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        dead = str(closed.getsockname()[1])

    def filled(text: str) -> str:
        return text.replace("{bucket}", bucket).replace("{dead}", dead)

    done = trimsfs(
        *("mount", mountpoint, "--store", filled(store), "--cache-dir", tmp_path / "cache"),
        *map(filled, options),
        environment=ceph.environment() | environment,
    )

    assert done.returncode == code, done.stderr
    assert filled(message) in done.stderr
    assert done.stderr.count("\n") == 1
    assert ceph.secret_key not in done.stderr
    assert mount_at(mountpoint) is None


def test_version_replaced_while_it_is_read_goes_on_to_its_end(ceph: Ceph, bucket: str, tmp_path: Path) -> None:
    old, new = (random.Random(seed).randbytes(40 * MIB) for seed in (5, 6))
    with contextlib.closing(ceph.client()) as client:
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
    put(ceph, bucket, {"model": old})
    # Chunks cannot be kept, so that what is read later must be fetched later.
    options = ("--cache-size", "1MiB", "--metadata-ttl", "0.2")
    with (
        mounted(f"s3://{bucket}", tmp_path, *options, environment=ceph.environment()) as mount,
        (mount.path / "model").open("rb", buffering=0) as file,
    ):
        assert file.read(1) == old[:1]
        put(ceph, bucket, {"model": new})
        time.sleep(0.3)
        assert (mount.path / "model").read_bytes() == new
        file.seek(0)
        assert b"".join(iter(lambda: file.read(MIB), b"")) == old


def test_object_replaced_without_versions_gives_estale_and_then_the_new_one(
    ceph: Ceph, bucket: str, tmp_path: Path
) -> None:
    old, new = (random.Random(seed).randbytes(40 * MIB) for seed in (7, 8))
    put(ceph, bucket, {"model": old})
    with (
        mounted(f"s3://{bucket}", tmp_path, "--cache-size", "1MiB", environment=ceph.environment()) as mount,
        (mount.path / "model").open("rb", buffering=0) as file,
    ):
        assert file.read(1) == old[:1]
        put(ceph, bucket, {"model": new})
        with pytest.raises(OSError, match="Stale file handle") as caught:
            os.pread(file.fileno(), MIB, 39 * MIB)
        assert caught.value.errno == errno.ESTALE
        assert "cannot be completed: Stale file handle: model: " in mount.log()
        assert (mount.path / "model").read_bytes() == new


def test_store_that_is_down_serves_what_is_cached_and_fails_the_rest_in_time(
    ceph: Ceph, bucket: str, tmp_path: Path
) -> None:
    cached, rest = (random.Random(seed).randbytes(12 * MIB) for seed in (9, 10))
    put(ceph, bucket, {"m/cached": cached, "m/rest": rest, "unlisted/x": b"x"})
    options = ("--retry-deadline", "1", "--metadata-ttl", "1")
    with (
        switched(ceph) as (server, switch),
        mounted(f"s3://{bucket}", tmp_path, *options, environment=server.environment()) as mount,
    ):
        assert (mount.path / "m/cached").read_bytes() == cached
        assert (mount.path / "m/rest").stat().st_size == len(rest)
        switch.off()
        time.sleep(1.1)
        assert (mount.path / "m/cached").read_bytes() == cached
        assert sorted(os.listdir(mount.path / "m")) == ["cached", "rest"]
        began = time.monotonic()
        with pytest.raises(OSError, match="Input/output error"):
            (mount.path / "m/rest").read_bytes()
        assert time.monotonic() - began < 12  # the deadline is 15 s if it is not set
        assert not (mount.path / "m/other").exists(), "as the last listing says"
        # A name of which nothing is known cannot be called absent while the store cannot say so.
        with pytest.raises(OSError, match="Input/output error"):
            (mount.path / "unlisted/other").stat()
        assert "cannot be completed: Input/output error: m/rest at " in mount.log()
        switch.on()
        wait_until(lambda: (mount.path / "m/rest").read_bytes() == rest, tolerate=OSError)


def test_keys_that_cannot_be_files_are_hidden_and_counted(ceph: Ceph, bucket: str, tmp_path: Path) -> None:
    put(
        ceph,
        bucket,
        {
            "good": b"1",
            "a": b"file",
            "a/b": b"2",
            "c//d": b"3",
            "./e": b"4",
            "../f": b"7",
            "n" * 300: b"5",
            ".trims": b"6",
            "dir/": b"",
        },
    )
    with mounted(f"s3://{bucket}", tmp_path, environment=ceph.environment()) as mount:
        assert sorted(os.listdir(mount.path)) == ["a", "c", "dir", "good"]
        assert os.listdir(mount.path / "c") == []
        assert os.listdir(mount.path / "dir") == []
        assert (mount.path / "a/b").read_bytes() == b"2"
        # ".", "..", the 300 bytes, ".trims" and the file "a" in the root; the empty name in "c".
        assert mount.metrics()["trimsfs_names_hidden_keys"] == 6


def test_no_secret_is_in_the_log_the_command_line_or_the_control_files(ceph: Ceph, bucket: str, tmp_path: Path) -> None:
    put(ceph, bucket, {"model": b"weights"})
    with mounted(f"s3://{bucket}", tmp_path, "--log-level", "debug", environment=ceph.environment()) as mount:
        (mount.path / "model").read_bytes()
        facts = mount.control()
        shown = [mount.log(), str(facts), (mount.path / ".trims/models").read_text(), Path("/proc/mounts").read_text()]
        shown += [Path(f"/proc/{facts[f'{who}_pid']}/cmdline").read_text() for who in ("server", "keeper")]
    assert not any(ceph.secret_key in text for text in shown)
