"""The scaling study at its smallest, on real mounts."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks.bench import Bench
from tests.benchmarks.data import BUCKET, Data
from tests.benchmarks.scale import MIB, QUICK, Scale
from tests.benchmarks.scaling import growths, slopes, study
from tests.services.fast import start_fast

pytestmark = pytest.mark.timeout(200)
NONE: tuple[int, ...] = ()
SMALLEST = replace(
    QUICK,
    big=MIB,
    operations=50,
    objects=NONE,
    objects_in_one_directory=NONE,
    mounts=NONE,
    files=NONE,
    sharers=NONE,
    object_gb=NONE,
    settle_s=0.5,
    rest_s=0.5,
)


def measured(root: Path, scale: Scale) -> dict[str, dict[str, list[int]]]:
    """The numbers for which the study has a sample, by group and name."""
    root.chmod(0o755)
    data = Data(root)
    (data.store / BUCKET).mkdir(parents=True)
    with start_fast(data.store) as server:
        bench = Bench(scale, root, data, server, server, Console(quiet=True))
        growths.scale(bench)
    results = bench.results
    assert not results.failures
    return {
        group: {
            name: [number for number, _ in slopes.points(results, group, name)] for name in slopes.names(results, group)
        }
        for group in slopes.GROUPS
    }


def test_names_and_files(tmp_path: Path) -> None:
    found = measured(tmp_path, replace(SMALLEST, objects=(20,), files=(3,)))

    common = {study.STAT, study.LS, study.OPEN, study.OPEN_CPU, study.MEMORY, study.CPU}
    expected = {
        growths.OBJECTS: common | {study.MOUNT, study.COMMAND_LS, study.UMOUNT},
        growths.CACHE: common | {study.MOUNT, growths.VERIFIED},
        growths.FILES: common | {growths.FIRST_OPEN, study.UMOUNT, growths.DESCRIPTORS, growths.PASSED},
    }
    assert {group: set(names) for group, names in found.items() if names} == expected
    assert all(numbers == [20] for numbers in found[growths.OBJECTS].values())
    assert all(numbers == [3] for group in (growths.CACHE, growths.FILES) for numbers in found[group].values())


@pytest.mark.slow
def test_all_else(tmp_path: Path) -> None:
    rest = replace(SMALLEST, objects_in_one_directory=(20,), mounts=(1, 2), sharers=(2,), object_gb=(1,))
    found = measured(tmp_path, rest)

    assert [group for group, names in found.items() if names] == [
        growths.FLAT,
        growths.MOUNTS,
        growths.READERS,
        growths.SIZE,
    ]
    assert all(numbers == [1, 2] for numbers in found[growths.MOUNTS].values())
