"""The scaling study at its smallest, on real mounts."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.benchmarks.bench import Bench
from tests.benchmarks.data import BUCKET, Data
from tests.benchmarks.scale import MIB, QUICK
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


def test_names_and_files(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    data = Data(tmp_path)
    (data.store / BUCKET).mkdir(parents=True)
    with start_fast(data.store) as server:
        scale = replace(SMALLEST, objects=(20,), files=(3,))
        bench = Bench(scale, tmp_path, data, server, server, Console(quiet=True))
        growths.scale(bench)
    assert not bench.results.failures
    found = {
        group: {
            name: [number for number, _ in slopes.points(bench.results, group, name)]
            for name in slopes.names(bench.results, group)
        }
        for group in slopes.GROUPS
    }

    common = {study.STAT, study.LS, study.OPEN, study.OPEN_CPU, study.MEMORY, study.CPU}
    expected = {
        growths.OBJECTS: common | {study.MOUNT, study.COMMAND_LS, study.UMOUNT},
        growths.CACHE: common | {study.MOUNT, growths.VERIFIED},
        growths.FILES: common | {growths.FIRST_OPEN, study.UMOUNT, growths.DESCRIPTORS, growths.PASSED},
    }
    assert {group: set(names) for group, names in found.items() if names} == expected
    assert all(numbers == [20] for numbers in found[growths.OBJECTS].values())
    assert all(numbers == [3] for group in (growths.CACHE, growths.FILES) for numbers in found[group].values())
