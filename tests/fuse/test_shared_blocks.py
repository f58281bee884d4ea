"""What models have in common is mapped once: on a real mount, with the cache on a file system that can share blocks."""

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.support.images import image_of
from tests.support.mounts import MountedStore, mounted, trimsfs, wait_until
from trimsfs.client import pages

NAME = "weights.safetensors"
SIZE = 24 << 20
HEAD = 1 << 20
"""Bytes at the end that are of each model alone."""
CHILD = """
import json, sys, zlib
import trimsfs

for path in sys.argv[1:]:
    model = trimsfs.open(path)
    (weights,) = map(model.raw, model.table.tensors)
    before = zlib.crc32(weights)
    mapped = {}
    for line in open("/proc/self/smaps"):
        first, *others = line.split()
        if "-" in first:
            name = others[-1] if len(others) == 5 else ""
        elif first == "Rss:" and name.endswith(".safetensors"):
            mapped[name] = mapped.get(name, 0) + int(others[0]) * 1024
    weights[:100] = weights[-100:] = bytes(100)
    after = zlib.crc32(weights)
    print(json.dumps({"before": before, "after": after, "mapped": mapped}))
    del model, weights
"""


@dataclass(frozen=True, slots=True)
class Variants:
    """A mounted store with two variants of a model, of which the second is told to map the first, and a stranger."""

    mount: MountedStore
    store: Path
    first: str
    second: str


def write(path: Path, head: int) -> None:
    header = json.dumps({"weights": {"dtype": "U8", "shape": [SIZE], "data_offsets": [0, SIZE]}}).encode()
    weights = Random(0).randbytes(SIZE - HEAD) + Random(head).randbytes(HEAD)
    path.parent.mkdir(parents=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + weights)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Variants]:
    scratch = tmp_path_factory.mktemp("common")
    store = scratch / "store"
    for number, directory in enumerate(("one", "two/deeper"), 1):
        write(store / directory / NAME, number)
    with image_of("xfs", scratch) as disk:
        os.symlink(disk, scratch / "cache")
        with mounted(store, scratch, "--share-chunks", "--min-free", "0") as mount:
            keys = [f"one/{NAME}", f"two/deeper/{NAME}"]
            for key in keys:
                (mount.path / key).read_bytes()
            wait_until(lambda: any(told(mount, key) for key in keys), timeout_s=60)
            assert mount.metrics()["trimsfs_sharing_shared_bytes_total"] >= SIZE - 2 * HEAD
            first, second = sorted(keys, key=lambda key: bool(told(mount, key)))
            yield Variants(mount, store, first, second)


def told(mount: MountedStore, key: str) -> dict[str, Any]:
    """What the mount says that a file has in common with another."""
    path = mount.path / key
    answer: dict[str, Any] = json.loads((path.parent / ".trims" / path.name / "shared").read_text())
    return answer


def opened(*paths: Path, before: str = "") -> list[dict[str, Any]]:
    """What a process finds that opens models one after the other; *before* is code that it runs first."""
    command = [sys.executable, "-c", before + CHILD, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_variant_maps_what_it_has_in_common_from_the_other(variants: Variants) -> None:
    mount, first, second = variants.mount, variants.first, variants.second
    assert told(mount, first) == {}
    assert told(mount, second)["path"] == os.path.relpath(first, Path(second).parent)
    (on_mount,) = opened(mount.path / second)
    (native,) = opened(variants.store / second)
    assert (on_mount["before"], on_mount["after"]) == (native["before"], native["after"])
    assert on_mount["mapped"][str(mount.path / first)] >= SIZE - 2 * HEAD
    assert on_mount["mapped"][str(mount.path / second)] <= 2 * HEAD


def test_writing_to_what_is_in_common_changes_no_other_model(variants: Variants) -> None:
    paths = [variants.mount.path / key for key in (variants.second, variants.first, variants.second)]
    natives = [variants.store / key for key in (variants.second, variants.first, variants.second)]
    assert [found["before"] for found in opened(*paths)] == [found["before"] for found in opened(*natives)]


def test_only_the_generation_that_was_told_is_mapped(variants: Variants, tmp_path: Path) -> None:
    """The name may lead to another by the time that it is opened."""
    first, second = variants.mount.path / variants.first, variants.mount.path / variants.second
    answer = told(variants.mount, variants.second) | {"path": str(first)}
    lies: list[dict[str, str]] = [{}, {"generation": "0" * 32}, {"path": "nowhere"}]
    mapped = []
    listing = tmp_path / "shared"
    before = f"""
from pathlib import Path
from trimsfs.client import shared_blocks
shared_blocks.control_file = lambda *_: Path({str(listing)!r})
"""
    for lie in lies:
        listing.write_text(json.dumps(answer | lie))
        mapped += [str(first) in found["mapped"] for found in opened(second, before=before)]
    assert mapped == [True, False, False]


def test_a_link_from_elsewhere_leads_to_what_is_in_common(variants: Variants, tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to(variants.mount.path / variants.second)
    (found,) = opened(tmp_path / "link.safetensors")
    assert found["mapped"][str(variants.mount.path / variants.first)] >= SIZE - 2 * HEAD


def test_what_two_models_rewrite_alike_is_folded_once(variants: Variants) -> None:
    try:
        pages.own(0, 0)
    except OSError:
        pytest.skip("needs Linux 6.7")
    script = """
import json, sys, trimsfs, zlib
model = trimsfs.open(sys.argv[1])
(weights,) = map(model.raw, model.table.tensors)
weights[:] = weights.tobytes()[::-1]
before = zlib.crc32(weights)
folded = model.fold()
print(json.dumps({"own": folded.own, "passed_on": folded.passed_on, "same": before == zlib.crc32(weights)}))
"""
    found = {}
    for key in (variants.first, variants.second):
        command = [sys.executable, "-c", script, str(variants.mount.path / key)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found[key] = json.loads(done.stdout)
        assert (found[key]["own"], found[key]["same"]) == (0, True)
    assert found[variants.first]["passed_on"] >= SIZE
    assert HEAD <= found[variants.second]["passed_on"] <= 4 * HEAD


def test_the_other_model_is_not_evicted_while_its_blocks_are_mapped(variants: Variants) -> None:
    path = variants.mount.path / variants.second
    script = (
        f"import trimsfs, zlib; mapping = trimsfs.open({str(path)!r}).mapping; print(); input(); "
        "print(zlib.crc32(mapping))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        mapped = Path(f"/proc/{process.pid}/maps").read_text()
        assert str(variants.mount.path / variants.first) in mapped
        assert trimsfs("evict", variants.mount.path / variants.first).returncode == 12
        checksum, _ = process.communicate("\n")
    assert int(checksum) == zlib.crc32((variants.store / variants.second).read_bytes())
    assert trimsfs("evict", variants.mount.path / variants.first).returncode == 0
    assert told(variants.mount, variants.second) == {}


def test_without_the_option_nothing_is_told(tmp_path: Path, store_directory: Path) -> None:
    write(store_directory / "one" / NAME, 1)
    with mounted(store_directory, tmp_path) as mount:
        assert not (mount.path / "one/.trims" / NAME / "shared").exists()
        (found,) = opened(mount.path / "one" / NAME)
        assert list(found["mapped"]) == [str(mount.path / "one" / NAME)]
        assert mount.metrics()["trimsfs_sharing_shared_bytes_total"] == 0
