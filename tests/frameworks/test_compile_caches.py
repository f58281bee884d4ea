"""What PyTorch has compiled, as a version beside a model: hosts find it there, and publish what they add."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.frameworks import PROGRAMS
from tests.support.frameworks import TIMEOUT_S, python_of, report_of
from tests.support.mounts import mounted, overlay, trimsfs, umount
from tests.support.processes import run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.timeout(3 * TIMEOUT_S),
]


@contextmanager
def written_over(version: Path, directory: Path) -> Iterator[None]:
    """The directory *merged* of a host shows a version, and takes what programs write."""
    run(*overlay(directory, version), check=True)
    try:
        yield
    finally:
        umount(directory / "merged")


def compiled(cache: Path, *sizes: int) -> dict[str, Any]:
    command: list[str | Path] = [python_of("others"), PROGRAMS / "torch_compile.py", *map(str, sizes)]
    return report_of(command, {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"})


def push(cache: Path, store: Path, version: str) -> None:
    done = trimsfs("push", cache, f"{store}/llama-compiled:{version}")
    assert done.returncode == 0, done.stderr


def test_a_host_finds_what_another_has_compiled_and_adds_to_it(tmp_path: Path) -> None:
    store, cache = tmp_path / "store", tmp_path / "merged"
    (store / "llama").mkdir(parents=True)
    (store / "llama/config.json").write_text("{}")
    cache.mkdir()
    first = compiled(cache, 1)
    assert (first["found"], first["compiled"]) == (0, 1)
    push(cache, store, "v1")
    with mounted(store, tmp_path / "host", "--metadata-ttl", "0.1") as mount:
        versions = mount.path / "llama-compiled"
        with written_over(versions / "v1", tmp_path):
            assert compiled(cache, 1) == first | {"found": 1, "compiled": 0}
            both = compiled(cache, 1, 2)
            assert (both["found"], both["compiled"]) == (1, 1)
            push(cache, store, "v2")
        (tmp_path / "upper").rename(tmp_path / "upper-of-v1")
        with written_over(versions / "v2", tmp_path):
            assert compiled(cache, 1, 2) == both | {"found": 2, "compiled": 0}
