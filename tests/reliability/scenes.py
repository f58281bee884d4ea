"""A mount of a bucket behind a proxy that injects faults, and what must hold whatever happens there."""

import contextlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.objects import Objects
from tests.reliability.readers import FaultReader
from tests.services import S3Server
from tests.services.faulty import FaultyS3, faulty
from tests.support.mounts import MountedStore, mounted, trimsfs, wait_until
from tests.support.readers import Processes, Report
from tests.support.survival import Survived

READERS = 3
SIZES = (100_000, 1_000_000, 17 << 20, 300_000, 1, 2 << 20)
WARM = {f"warm/{number}": size for number, size in enumerate((9 << 20, 300_000, 5_000))}
LONGEST_S = 20.0
"""No operation may take longer, whatever happens: longer than this is a hang."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A mount of a bucket behind a proxy."""

    mount: MountedStore
    objects: Objects
    server: S3Server
    through: FaultyS3
    directory: Path

    def put(self, prefix: str, *, listed: bool, in_parts: bool = False) -> tuple[list[str], str]:
        """New objects, of which the mount knows the names, or no more than that there is such a directory.

        The last is a spare one, for those who look whether something that was never read can be.
        """
        sizes = {f"{prefix}/{number}": size for number, size in enumerate(SIZES)}
        self.objects.sizes |= sizes
        self.objects.put_all(self.server, sizes, in_parts=in_parts)
        # Names that are not known are not asked for again for some seconds after the store has failed.
        wait_until((self.mount.path / prefix).is_dir, tolerate=OSError)
        if listed:
            assert len(list((self.mount.path / prefix).iterdir())) == len(sizes)
        *names, spare = sizes
        return names, spare

    def reading(self, shaky: Sequence[str], fleeting: Sequence[str] = ()) -> Processes:
        """Processes that read what may not fail, what may, and what may even be absent."""

        def make(seed: int) -> FaultReader:
            return FaultReader(self.mount.path, self.objects, seed, firm=list(WARM), shaky=shaky, fleeting=fleeting)

        return Processes(make, self.directory, count=READERS)

    def recovered(self, names: Collection[str], *, absent: bool = False) -> float:
        """Wait until all can be read, as nothing goes wrong any more; the time until the first could.

        None may be *absent* meanwhile, unless it had been.
        """
        began = time.monotonic()
        took: float | None = None
        for name in names:
            while True:
                try:
                    self.read(name)
                    break
                except OSError as error:
                    if isinstance(error, FileNotFoundError) and not absent:
                        raise
                    assert time.monotonic() - began < LONGEST_S, name
                    time.sleep(0.02)
            took = took or time.monotonic() - began
        assert took is not None
        return took

    def read(self, name: str) -> None:
        found = (self.mount.path / name).read_bytes()
        right = found == self.objects.expected(name, len(found), 0, len(found))
        assert right, f"{name} is not what was put"

    def settled(self, names: Collection[str]) -> float:
        """Wait until all show what was put last, and can be read; how long until the first could be read."""
        took = self.recovered(names, absent=True)
        for name in names:
            path, size = self.mount.path / name, self.objects.size(name)
            wait_until(lambda: path.stat().st_size == size, tolerate=OSError)  # noqa: B023
            self.read(name)
        return took


@contextlib.contextmanager
def scene(
    server: S3Server,
    directory: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    warm_within_s: float = 0,
) -> Iterator[Scene]:
    """A mount with some objects that are here. Nothing goes wrong yet.

    *environment* adds to the proxy's own. The first `warm` must succeed, or one that begins *warm_within_s* later.
    """
    bucket = f"faults-{time.monotonic_ns()}"
    with contextlib.closing(server.client()) as client:
        client.create_bucket(Bucket=bucket)
    truth = directory / "truth"
    truth.mkdir()
    objects = Objects(truth, bucket, dict(WARM))
    objects.put_all(server, WARM)
    fixed = ("stall_timeout=0.5", "--metadata-ttl", "1")
    with (
        faulty(server) as through,
        mounted(
            f"s3://{bucket}", directory, *fixed, *options, environment={**through.environment(), **(environment or {})}
        ) as mount,
    ):
        wait_until(lambda: trimsfs("warm", mount.path / "warm").returncode == 0, timeout_s=warm_within_s)
        yield Scene(mount, objects, server, through, directory)


def command(path: Path, verb: str, timeout_s: float = LONGEST_S) -> dict[str, Any]:
    """Give a command by control file, and wait for its end; its last word."""
    ends = time.monotonic() + timeout_s
    with (path.parent / ".trims" / path.name / verb).open("rb", buffering=0) as file:
        while time.monotonic() < ends:
            said: dict[str, Any] = json.loads(file.readline())
            if said["state"] != "running":
                return said
    raise AssertionError(f"{verb} {path} has not ended in {timeout_s:g} s")


def at_rest(mount: MountedStore) -> None:
    """Nothing is in use, soon, and nothing comes."""
    used = ("files_open_handles", "disk_open_blobs", "fetch_in_flight", "fetch_waiting", "prefetch_coming_files")

    def rests() -> bool:
        metrics = mount.metrics()
        return not any(metrics[f"trimsfs_{name}"] for name in used)

    wait_until(rests, timeout_s=LONGEST_S)


@contextlib.contextmanager
def unharmed(one: Scene) -> Iterator[None]:
    """After the block, the server is the one of before and no defect is in its log."""
    before, logged = one.mount.control(), len(one.mount.log())
    try:
        yield
    finally:
        one.through.heal()
    after = one.mount.control()
    assert (after["server_pid"], after["restarts"]) == (before["server_pid"], before["restarts"])
    assert "Traceback" not in one.mount.log()[logged:]


def check(
    survived: Survived, fault: str, report: Report, injected: int, recovery_s: float, allowed: Collection[str] = ()
) -> None:
    """What readers saw of a fault. None of them may have met anything but errors to put up with, or have hung."""
    assert report.errors == []
    assert max(report.worst_s.values()) < LONGEST_S, report.worst_s
    survived(
        fault,
        injected=injected,
        operations=report.operations,
        errors=report.errnos,
        allowed=allowed,
        wrong=len(report.wrong),
        recovery_s=recovery_s,
    )
