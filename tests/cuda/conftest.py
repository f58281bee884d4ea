"""Devices and processes for the tests of the emulated driver itself."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from . import KernelDriver, environment
from .processes import CudaProcess, Start, cuda_process


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[KernelDriver]:
    """Two emulated devices of different sizes."""
    with KernelDriver(tmp_path, [64 << 20, 32 << 20]) as driver:
        yield driver


@pytest.fixture
def start(kernel: KernelDriver) -> Iterator[Start]:
    """Starts processes in which a device is current, unless that is None."""
    with ExitStack() as stack:

        def started(
            device: int | None = 0,
            variables: dict[str, str] | None = None,
            **switches: bool,
        ) -> CudaProcess:
            given = environment(kernel, **switches) | (variables or {})
            process = stack.enter_context(cuda_process(given))
            if device is not None:
                process.start(device)
            return process

        yield started
