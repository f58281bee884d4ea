"""The emulated driver is good enough for libraries that know nothing of it, and clean to the sanitizers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.frameworks import python_of
from tests.support.sanitizers import SANITIZE, reported, sanitized

from . import GRANULARITY, KernelDriver, environment, library
from .consume import CONTENT, LIBRARIES
from .processes import CudaError, Start

PROGRAM = Path(__file__).with_name("consume.py")


@pytest.mark.parametrize("name", LIBRARIES)
def test_libraries_read_device_memory(kernel: KernelDriver, name: str) -> None:
    python = python_of("numba") if name == "numba" else sys.executable
    done = subprocess.run(
        [python, PROGRAM, name],
        env=os.environ | environment(kernel),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"shape": [2, 3], "content": CONTENT.hex()}
    assert kernel.allocations() == []


def test_it_is_clean_to_the_sanitizers(start: Start, tmp_path: Path) -> None:
    log = tmp_path / "sanitizer"
    variables = sanitized(log) | {"LD_LIBRARY_PATH": str(library(*SANITIZE).parent)}
    process, other = start(0, variables), start(0, variables)
    assert process.threads(3, 5) == []
    handle = process.create(2 * GRANULARITY)
    descriptor = process.export(handle)
    pointer = process.map(handle, 2 * GRANULARITY)
    theirs = other.map(other.import_(descriptors=(descriptor,)), 2 * GRANULARITY, "PROT_READ")
    os.close(descriptor)
    process.write(pointer, "01")
    assert other.read(theirs, 1) == "01"
    handle = process.ipc_handle(process.call("cuMemAlloc", GRANULARITY))
    assert other.ipc_open(handle) == other.ipc_open(handle)
    stream = process.call("cuStreamCreate", 1)
    process.outcome("cuMemsetD8Async", pointer, 2, GRANULARITY, stream)
    process.outcome("cuStreamSynchronize", stream)
    assert other.read(theirs, 1) == "02"
    process.outcome("cuMemcpyDtoDAsync", pointer, pointer + 4096, 4096, stream)
    first = process.call("cuCtxGetCurrent")
    process.start(1)
    process.aside(first, "outcome", "cuStreamSynchronize", stream)
    process.aside(process.call("cuCtxGetCurrent"), "outcome", "cuCtxSynchronize")
    assert process.joined() == ["CUDA_SUCCESS"] * 2
    process.outcome("cuCtxSetCurrent", first)
    assert process.fork() == ["CUDA_ERROR_NOT_INITIALIZED"] * 2
    process.unmap(pointer, 2 * GRANULARITY)
    assert process.outcome("cuDevicePrimaryCtxReset", 0) == "CUDA_SUCCESS"
    assert process.outcome("cuMemcpyDtoD", pointer, pointer, 1) == "CUDA_ERROR_CONTEXT_IS_DESTROYED"
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        other.write(theirs, "01")
    assert reported(tmp_path) == ""
