"""What a network, a proxy and S3 do at times, and what readers of a mount see of it.

The server is a real one; between it and the mount is `tests.services.faulty`.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fuse.readers import Processes, Report
from tests.mounts import MountedStore, mounted, trimsfs, wait_until
from tests.reliability import Survival
from tests.reliability.conftest import Survived
from tests.reliability.objects import Objects
from tests.reliability.readers import FaultReader
from tests.services import S3Server
from tests.services.faults import FAULTS, LISTS
from tests.services.faulty import FaultyS3, Plan, faulty

READERS = 3
SIZES = (100_000, 1_000_000, 17 << 20, 300_000, 1)
WARM = {f"warm/{number}": size for number, size in enumerate((9 << 20, 300_000, 5_000))}
LONGEST_S = 20.0
"""No operation may take longer, whatever happens: longer than this is a hang."""

REFUSALS = {"expired token", "unknown access key", "wrong signature", "access denied", "clock skew"}
SILENT = {"flipped bit"}
"""What plain HTTP does not show: see the tests of it."""
ERRORS: dict[str, Collection[str]] = {
    **dict.fromkeys(REFUSALS, ("EACCES",)),
    "permanent redirect": ("EACCES",),
    "wrong ETag": ("ESTALE",),
}
"""Faults that are told at once, and how; all others are tried again first."""


@dataclass(frozen=True, slots=True)
class Scene:
    """A mount of a bucket behind a proxy."""

    mount: MountedStore
    objects: Objects
    server: S3Server
    through: FaultyS3
    directory: Path

    def put(self, prefix: str, *, listed: bool) -> list[str]:
        """New objects, of which the mount knows the names, or no more than that there is such a directory."""
        sizes = {f"{prefix}/{number}": size for number, size in enumerate(SIZES)}
        self.objects.sizes |= sizes
        self.objects.put_all(self.server, sizes)
        # Names that are not known are not asked for again for some seconds after the store has failed.
        wait_until((self.mount.path / prefix).is_dir, tolerate=OSError)
        if listed:
            assert len(list((self.mount.path / prefix).iterdir())) == len(sizes)
        return list(sizes)

    def reading(self, shaky: list[str]) -> Processes:
        """Processes that read what may fail, and what may not."""

        def make(seed: int) -> FaultReader:
            return FaultReader(self.mount.path, self.objects, seed, firm=list(WARM), shaky=shaky)

        return Processes(make, self.directory, count=READERS)

    def recovered(self, names: Collection[str]) -> float:
        """Wait until all can be read, as nothing goes wrong any more; the time until the first could."""
        began = time.monotonic()
        took: float | None = None
        for name in names:
            while True:
                try:
                    self.read(name)
                    break
                except FileNotFoundError:
                    raise
                except OSError:
                    assert time.monotonic() - began < LONGEST_S, name
                    time.sleep(0.02)
            took = took or time.monotonic() - began
        assert took is not None
        return took

    def read(self, name: str) -> None:
        """Read a whole file and compare it."""
        found = (self.mount.path / name).read_bytes()
        right = found == self.objects.expected(name, len(found), 0, len(found))
        assert right, f"{name} is not what was put"


@contextlib.contextmanager
def scene(server: S3Server, directory: Path, *options: str) -> Iterator[Scene]:
    """A mount with some objects that are here. Nothing goes wrong yet."""
    bucket = f"faults-{time.monotonic_ns()}"
    with contextlib.closing(server.client()) as client:
        client.create_bucket(Bucket=bucket)
    truth = directory / "truth"
    truth.mkdir()
    objects = Objects(truth, bucket, dict(WARM))
    objects.put_all(server, WARM)
    fixed = ("--stall-timeout", "0.5", "--metadata-ttl", "1")
    with (
        faulty(server) as through,
        mounted(f"s3://{bucket}", directory, *fixed, *options, environment=through.environment()) as mount,
    ):
        assert trimsfs("warm", mount.path / "warm").returncode == 0
        yield Scene(mount, objects, server, through, directory)


@pytest.fixture(scope="module")
def patient(ceph: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A mount that tries for as long as it does by default."""
    with scene(ceph, tmp_path_factory.mktemp("patient")) as made:
        yield made


@pytest.fixture(scope="module")
def impatient(ceph: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A mount that gives up soon."""
    with scene(ceph, tmp_path_factory.mktemp("impatient"), "--retry-deadline", "0.7") as made:
        yield made


@contextlib.contextmanager
def unharmed(one: Scene) -> Iterator[None]:
    """After the block, the server is the one of before and no defect is in its log."""
    before = one.mount.control()
    logged = len(one.mount.log())
    try:
        yield
    finally:
        one.through.heal()
    after = one.mount.control()
    assert (after["server_pid"], after["restarts"]) == (before["server_pid"], before["restarts"])
    assert "Traceback" not in one.mount.log()[logged:]


def slug(text: str) -> str:
    return text.lower().replace(" ", "-")


def survival(fault: str, report: Report, injected: Counter[str], allowed: Collection[str], recovery: float) -> Survival:
    assert report.errors == []
    assert max(report.worst_s.values()) < LONGEST_S, report.worst_s
    return Survival(
        fault=fault,
        injected=injected.total(),
        operations=report.operations,
        errors=report.errnos,
        allowed=allowed,
        wrong=len(report.wrong),
        recovery_s=recovery,
    )


def cases(faults: Collection[str], quick: Collection[str]) -> list[object]:
    """All faults as parameters, of which only the *quick* are tried by default."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in sorted(faults)]


QUICK = {
    "slow down",
    "reset",
    "truncated body",
    "stall in the body",
    "wrong Content-Range",
    "listing cut off",
    "listing that lost keys",
    "temporary redirect",
    "wrong ETag",
}


@pytest.mark.parametrize("fault", cases(FAULTS.keys() - SILENT, QUICK))
def test_what_passes_is_not_noticed_and_what_is_refused_is_told(fault: str, patient: Scene, survived: Survived) -> None:
    """The first two attempts at each request fail."""
    prefix = f"twice-{slug(fault)}"
    names = patient.put(prefix, listed=FAULTS[fault].kinds != LISTS)
    before = patient.through.injected()
    with unharmed(patient):
        patient.through.inject(Plan(faults=[fault], first=2, only=prefix))
        readers = patient.reading(names)
        time.sleep(1)
        report = readers.stop()
        patient.through.heal()
        recovery = patient.recovered(names)
    injected = patient.through.injected() - before
    survived(survival(f"{fault}, twice", report, injected, ERRORS.get(fault, ()), recovery))


@pytest.mark.parametrize("fault", cases(FAULTS.keys() - SILENT - {"wrong ETag"}, {"slow head", "expired token"}))
def test_what_lasts_is_told_in_time_and_forgotten(fault: str, impatient: Scene, survived: Survived) -> None:
    """Every attempt at each request fails, for a while."""
    prefix = f"always-{slug(fault)}"
    names = impatient.put(prefix, listed=FAULTS[fault].kinds != LISTS)
    before, logged = impatient.through.injected(), len(impatient.mount.log())
    with unharmed(impatient):
        impatient.through.inject(Plan(faults=[fault], only=prefix))
        readers = impatient.reading(names)
        time.sleep(2)
        report = readers.stop()
        injected = impatient.through.injected() - before
        impatient.through.heal()
        recovery = impatient.recovered(names)
    assert report.errnos.total() > 0
    assert prefix in impatient.mount.log()[logged:]
    survived(survival(f"{fault}, for long", report, injected, ERRORS.get(fault, ("EIO",)), recovery))
