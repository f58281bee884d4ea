"""A mount whose server lends copies of models on emulated devices, and programs that use them."""

import os
from collections.abc import Iterator

import pytest

from tests.cuda import KernelDriver, environment
from tests.gpu.mount import MODELS, GpuMount
from tests.support.mounts import mounted


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
