"""Hosts whose power is cut at any moment, on each file system: what they serve after it is right, and the cache stays.

The writes of a disk are logged while models are fetched, evicted, pushed and replaced, and servers restarted. From the
log comes what the disk holds if the power is cut at a moment: all that was flushed, and any part of what was not. The
kernel's own drivers mount that. Another boot is told by its identifier alone: no machine is started here.
"""

import bisect
import contextlib
import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.reliability.after_cut import Found, Order
from tests.reliability.logged_disk import LoggedDisk, logged_disk, need_programs
from tests.reliability.write_log import Disk
from tests.services.seaweed import Seaweed
from tests.support.mounts import MountedStore, mountctl, mounted, trimsfs, wait_until
from tests.support.survival import Survived
from trimsfs.tiers.disk.maintenance import LONGEST_SYNC_INTERVAL_S

CUTS = int(os.environ.get("CUTS", "40"))
WORK_S = 120.0
SETTLED_S = 2 * LONGEST_SYNC_INTERVAL_S
"""What has been whole for so long has reached the disk: it waits for one interval, and for its turn on a disk
that this test alone keeps busy."""
SIZES = {f"models/{number}/params": size << 20 for number, size in enumerate((1, 1, 2, 2, 3, 4, 4, 5, 17, 17, 20))}
PINNED = [f"models/{number}/params" for number in (2, 4, 8)]
"""Never evicted: what every cut must leave, once it has been there for long."""
CHANGING = {f"changing/{number}/params": 2 << 20 for number in range(3)}
OPTIONS = ("--cache-size", "72MiB", "--min-free", "0", "--metadata-ttl", "1", "--prefetch", "off")
PAUSE_S = 0.15
"""Between steps: none is missed by who looks at the files meanwhile."""

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.timeout(3600)]


@dataclass(slots=True)
class Store:
    """A bucket, and the sums of what it holds."""

    server: Seaweed
    bucket: str
    draw: random.Random
    sums: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    def put(self, name: str, size: int) -> None:
        content = self.draw.randbytes(size)
        with contextlib.closing(self.server.client()) as client:
            client.put_object(Bucket=self.bucket, Key=name, Body=content)
        self.sums[name] = hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True)
class Sample:
    """What was whole at a *time*, when so many *requests* had come to the disk."""

    time: float
    requests: int
    whole: frozenset[str]


@dataclass(slots=True)
class History:
    """What was whole when."""

    samples: list[Sample] = field(default_factory=list)

    def whole(self, requests: int) -> list[str]:
        """What has been whole for long when so many requests have come, and was not evicted since."""
        after = bisect.bisect_left(self.samples, requests, key=lambda sample: sample.requests)
        if after == len(self.samples):
            return []
        ends = self.samples[after].time
        begun = bisect.bisect_right(self.samples, ends - SETTLED_S, key=lambda sample: sample.time)
        if begun == 0:
            return []
        return sorted(frozenset.intersection(*(sample.whole for sample in self.samples[begun - 1 : after + 1])))


@contextmanager
def watched(mount: MountedStore, disk: LoggedDisk) -> Iterator[History]:
    """What is whole is looked at all the time during the block."""
    history, ended = History(), threading.Event()

    def is_whole(name: str) -> bool:
        return os.getxattr(mount.path / name, "user.trims.verified") == b"true"

    def watch() -> None:
        while not ended.is_set():
            whole = frozenset(name for name in SIZES if is_whole(name))
            history.samples.append(Sample(time.monotonic(), disk.requests(), whole))
            time.sleep(PAUSE_S / 3)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield history
    finally:
        ended.set()
        thread.join()


def work(store: Store, mount: MountedStore, directory: Path, draw: random.Random) -> None:
    """Whatever has a cache written, for a while; each file that is read must be right."""
    ends, count = time.monotonic() + WORK_S, 0
    assert trimsfs("pin", "--best-effort", *(mount.path / name for name in PINNED)).returncode == 0
    while time.monotonic() < ends:
        count += 1
        name = draw.choice([*SIZES])
        match draw.choices(("read", "evict", "replace", "push", "restart"), (20, 4, 2, 1, 1))[0]:
            case "read":
                content = (mount.path / name).read_bytes()
                assert hashlib.sha256(content).hexdigest() == store.sums[name], name
            case "evict" if name not in PINNED:
                assert trimsfs("evict", mount.path / name).returncode == 0
            case "replace":
                changing = draw.choice([*CHANGING])
                store.put(changing, CHANGING[changing])
                assert trimsfs("refresh", mount.path / changing).returncode == 0
                content = (mount.path / changing).read_bytes()
                assert hashlib.sha256(content).hexdigest() == store.sums[changing], changing
            case "push":
                push(store, directory / f"pushed-{count}", f"v{count}", draw)
                (pushed,) = (name for name in store.sums if name.startswith(f"pushed/v{count}/"))
                wait_until((mount.path / pushed).exists, tolerate=OSError)
                assert (mount.path / pushed).read_bytes()
            case "restart":
                assert mountctl("restart", mount.path).returncode == 0
        time.sleep(PAUSE_S)


def push(store: Store, directory: Path, version: str, draw: random.Random) -> None:
    content = draw.randbytes(1 << 20)
    directory.mkdir()
    (directory / "params").write_bytes(content)
    done = trimsfs("push", directory, f"{store.url}/pushed:{version}", environment=store.server.environment())
    assert done.returncode == 0, done.stderr
    store.sums[f"pushed/{version}/params"] = hashlib.sha256(content).hexdigest()


def looked_at(image: Path, store: Store, whole: list[str], directory: Path) -> Found:
    """What a host that boots with a disk serves."""
    directory.mkdir()
    order = Order(
        image=str(image),
        store=store.url,
        directory=str(directory),
        options=list(OPTIONS),
        sums=store.sums,
        whole=whole,
        restored=[name for name in PINNED if name not in whole],
    )
    path = directory / "order"
    path.write_text(json.dumps(dataclasses.asdict(order)))
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-m", "tests.reliability.after_cut", path],
        env=os.environ | store.server.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Found(**json.loads(done.stdout))


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_what_is_served_after_a_power_cut_is_right_and_what_was_whole_is_kept(
    kind: str, seaweed: Seaweed, tmp_path: Path, survived: Survived
) -> None:
    if (program := need_programs()) is not None:
        pytest.skip(f"{program} is not installed")
    draw = random.Random(kind)
    store = Store(seaweed, f"cuts-{kind}-{time.monotonic_ns()}", draw)
    with contextlib.closing(seaweed.client()) as client:
        client.create_bucket(Bucket=store.bucket)
    for name, size in (SIZES | CHANGING).items():
        store.put(name, size)
    with logged_disk(kind, tmp_path) as disk:
        (disk.mountpoint / "cache").mkdir()
        os.sync()
        begin = disk.requests()  # before, there is no disk for a cache
        (tmp_path / "work").mkdir()
        (tmp_path / "work/cache").symlink_to(disk.mountpoint / "cache")
        with (
            mounted(store.url, tmp_path / "work", *OPTIONS, environment=seaweed.environment()) as mount,
            watched(mount, disk) as history,
        ):
            work(store, mount, tmp_path, draw)
    kept = 0
    with Disk(disk.log, disk.before) as log:
        for number, requests in enumerate(sorted(draw.randrange(begin, len(log)) for _ in range(CUTS))):
            log.go_on(requests)
            image, whole = tmp_path / "cut", history.whole(requests)
            log.cut(image, draw)
            found = looked_at(image, store, whole, tmp_path / f"cut-{number}")
            assert found == Found(), f"cut {number}, after {requests} requests of {len(log)}"
            kept += len(whole)
    assert kept > CUTS, "too little was whole for long"
    survived(f"power cut among {len(log)} requests to the disk of the cache ({kind})", injected=CUTS, operations=kept)
