"""What a network, a proxy and S3 do at times, and what readers of a mount see of it.

The server is a real one; between it and the mount is `tests.services.faulty`.
"""

import time
from collections.abc import Collection, Iterator

import pytest

from tests.reliability.scenes import Scene, check, scene, unharmed
from tests.services import S3Server
from tests.services.faults import FAULTS, LISTS
from tests.services.faulty import Plan
from tests.support.mounts import trimsfs, wait_until
from tests.support.readers import Report
from tests.support.survival import Survived

REFUSALS = {"expired token", "unknown access key", "wrong signature", "access denied", "clock skew"}
SILENT = {"flipped bit"}
"""What plain HTTP does not show: see the tests of it."""
ERRORS: dict[str, Collection[str]] = {
    **dict.fromkeys(REFUSALS, ("EACCES",)),
    "permanent redirect": ("EACCES",),
    "wrong ETag": ("ESTALE",),
}
"""Faults that are told at once, and how; all others are tried again first."""


@pytest.fixture(scope="module")
def patient(ceph: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A mount that tries for as long as it does by default."""
    with scene(ceph, tmp_path_factory.mktemp("patient")) as made:
        yield made


@pytest.fixture(scope="module")
def impatient(ceph: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A mount that gives up soon, also where a busy host lets the server answer late: so its files may come late."""
    directory = tmp_path_factory.mktemp("impatient")
    with scene(ceph, directory, "--retry-deadline", "0.7", warm_within_s=60) as made:
        yield made


def slug(text: str) -> str:
    return text.lower().replace(" ", "-")


def cases(faults: Collection[str], quick: Collection[str]) -> list[object]:
    """All faults as parameters, of which only the *quick* are tried by default."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in sorted(faults)]


QUICK = {"reset", "stall in the body", "slow body", "listing that lost keys"}


def inflict(
    survived: Survived,
    scene: Scene,
    fault: str,
    how: str,
    allowed: Collection[str],
    *,
    seconds: float,
    first: int | None = None,
) -> Report:
    """Have each request for new objects fail, or its *first* attempts, while they are read for some seconds."""
    prefix = slug(f"{how} {fault}")
    names, spare = scene.put(prefix, listed=FAULTS[fault].kinds != LISTS)
    before = scene.through.injected()
    with unharmed(scene):
        scene.through.inject(Plan(faults=[fault], first=first, only=prefix))
        readers = scene.reading(names)
        time.sleep(seconds)
        report = readers.stop()
        scene.through.heal()
        recovery = scene.recovered([spare, *names])
    check(survived, f"{fault}, {how}", report, (scene.through.injected() - before).total(), recovery, allowed)
    return report


@pytest.mark.parametrize("fault", cases(FAULTS.keys() - SILENT, QUICK))
def test_what_passes_is_not_noticed_and_what_is_refused_is_told(fault: str, patient: Scene, survived: Survived) -> None:
    """The first two attempts at each request fail."""
    inflict(survived, patient, fault, "twice", ERRORS.get(fault, ()), seconds=1, first=2)


@pytest.mark.parametrize("fault", cases(FAULTS.keys() - SILENT - {"wrong ETag"}, {"slow body"}))
def test_what_lasts_is_told_in_time_and_forgotten(fault: str, impatient: Scene, survived: Survived) -> None:
    """Every attempt at each request fails, for a while."""
    logged = len(impatient.mount.log())
    report = inflict(survived, impatient, fault, "for long", ERRORS.get(fault, ("EIO",)), seconds=2)
    assert report.errnos.total() > 0
    assert slug(f"for long {fault}") in impatient.mount.log()[logged:]


@pytest.mark.parametrize("in_parts", [False, True], ids=["whole", "in parts"])
def test_a_bit_that_was_flipped_on_the_way_is_in_no_file_that_is_here(
    in_parts: bool, patient: Scene, survived: Survived
) -> None:
    """The first answer to each request is damaged. HTTPS finds that by itself; over HTTP, only a digest can."""
    prefix = f"flipped-{in_parts}"
    names, _ = patient.put(prefix, listed=True, in_parts=in_parts)
    before = patient.through.injected()
    with unharmed(patient):
        patient.through.inject(Plan(faults=["flipped bit"], first=1, only=prefix))
        trimsfs("warm", patient.mount.path / prefix)  # which may fail
        patient.through.heal()
        assert trimsfs("warm", patient.mount.path / prefix).returncode == 0
        wrong = 0
        for name in names:
            wait_until(lambda: patient.mount.info(name)["verified"], timeout_s=60)  # noqa: B023
            found = (patient.mount.path / name).read_bytes()
            wrong += found != patient.objects.expected(name, len(found), 0, len(found))
    injected = (patient.through.injected() - before).total()
    fault = "flipped bit, once, of objects in parts" if in_parts else "flipped bit, once"
    survived(fault, injected=injected, operations=len(names), wrong=wrong)
