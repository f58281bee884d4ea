"""Mounts whose servers lend copies of models on emulated devices."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda import KernelDriver, environment
from tests.gpu.mount import MODELS, GpuMount
from tests.gpu.scene import SIZE, Scene, scene
from tests.support.mounts import mounted


@pytest.fixture
def store(store_directory: Path) -> Path:
    """A store of two files that are of no known format."""
    for name in ("net.bin", "other.bin"):
        (store_directory / name).write_bytes(random.Random(name).randbytes(SIZE))
    return store_directory


@pytest.fixture
def host(request: pytest.FixtureRequest, store: Path, tmp_path: Path) -> Iterator[Scene]:
    """A mount of the store, with the options that a test gives as the parameter ``host``, where there are two GPUs."""
    with scene(store, tmp_path, *getattr(request, "param", ())) as found:
        yield found


@pytest.fixture(scope="module")
def gpu_mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuMount]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    scratch = tmp_path_factory.mktemp("gpu")
    store = scratch / "store"
    store.mkdir()
    for name, data in MODELS.items():
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).write_bytes(data)
    with (
        KernelDriver(scratch, [2 << 30] * 2) as kernel,
        mounted(store, scratch, environment=environment(kernel)) as mount,
    ):
        yield GpuMount(kernel, mount)
