"""Models with MD5 ETags are compared with them once they are loaded, not while others still load."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import S3Server
from tests.services.buckets import CHECKSUM, uploaded
from tests.services.fast import start_fast
from tests.support.keepers import kill, roles
from tests.support.mounts import MountedStore, mounted, wait_until
from tests.support.parts import blob_files, flip_byte

MIB = 1 << 20
NAMES = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
CONTENTS = {name: random.Random(name).randbytes(24 * MIB + 77) for name in NAMES}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    """Tells of each file an ETag of its parts, and no checksum that is compared before it is opened."""
    root = tmp_path / "store"
    (root / "bucket").mkdir(parents=True)
    for name, content in CONTENTS.items():
        path = root / "bucket" / name
        path.write_bytes(content)
        uploaded(path)
        os.removexattr(path, CHECKSUM)
    with start_fast(root, rate=40 * MIB) as server:
        yield server


def count(mount: MountedStore, name: str) -> float:
    return mount.metrics()[f"trimsfs_integrity_{name}"]


def test_a_load_of_several_files_is_over_before_the_first_is_compared(server: S3Server, tmp_path: Path) -> None:
    with mounted("s3://bucket", tmp_path / "mount", "--prefetch=off", environment=server.environment()) as mount:
        for number, name in enumerate(NAMES):
            assert (mount.path / name).read_bytes() == CONTENTS[name]
            wait_until(lambda number=number: count(mount, "to_compare") == number + 1)  # type: ignore[misc]
            assert count(mount, "compared_total") == 0
            assert "digest" not in roles(mount).values()
            assert not mount.info(name)["verified"]
        damaged = next(file for file in blob_files(mount.cache) if file.read_bytes() == CONTENTS[NAMES[2]])
        flip_byte(damaged, 9 * MIB)
        wait_until(lambda: "digest" in roles(mount).values(), timeout_s=60)
        wait_until(lambda: count(mount, "to_compare") == 0, timeout_s=60)
        assert count(mount, "compared_total") == len(NAMES)
        assert count(mount, "repaired_chunks_total") == 1
        for name in NAMES:
            assert mount.info(name)["verified"]
            assert mount.info(name)["digest"].endswith("-4")
        assert damaged.read_bytes() == CONTENTS[NAMES[2]]
        assert (mount.path / NAMES[2]).read_bytes() == CONTENTS[NAMES[2]]
        wait_until(lambda: "digest" not in roles(mount).values(), timeout_s=60)


def test_what_a_killed_server_has_not_compared_its_successor_compares(server: S3Server, tmp_path: Path) -> None:
    with mounted("s3://bucket", tmp_path / "mount", "--prefetch=off", environment=server.environment()) as mount:
        for name in NAMES:
            assert (mount.path / name).read_bytes() == CONTENTS[name]
        kill(mount)
        wait_until(lambda: count(mount, "compared_total") == len(NAMES), timeout_s=60)
        assert count(mount, "to_compare") == 0
        assert all(mount.info(name)["verified"] for name in NAMES)
