"""The emulated driver: copies, which are done when something waits for them and not before, and page-locked memory."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.mounts import wait_until

from . import GRANULARITY, STALE, KernelDriver
from .processes import CudaError, CudaProcess, Start

MIB = 1 << 20
UNTOUCHED = f"{STALE:02x}"
DEFAULT, BLOCKING, NON_BLOCKING = 0, 0, 1


def test_a_missing_synchronisation_shows(start: Start) -> None:
    process = start()
    pointer, stream = process.call("cuMemAlloc", MIB), process.call("cuStreamCreate", NON_BLOCKING)
    buffer = process.call("cuMemHostAlloc", MIB, 0)
    process.fill_host(buffer, 1, MIB)
    process.outcome("cuMemcpyHtoDAsync", pointer, buffer, MIB, stream)
    assert process.read(pointer, 2) == UNTOUCHED * 2  # not waited for
    process.fill_host(buffer, 2, MIB)  # used again too early
    process.outcome("cuStreamSynchronize", stream)
    assert process.read(pointer, 2) == "0202"
    process.fill_host(buffer, 3, MIB)
    process.outcome("cuMemcpyDtoHAsync", buffer, pointer, MIB, stream)
    assert process.read_host(buffer, 2) == "0303"
    process.outcome("cuCtxSynchronize")
    assert process.read_host(buffer, 2) == "0202"


@pytest.mark.parametrize("size", [4096, MIB])
def test_pageable_memory_may_be_used_again_at_once(start: Start, size: int) -> None:
    process = start()
    pointer, stream = process.call("cuMemAlloc", MIB), process.call("cuStreamCreate", NON_BLOCKING)
    buffer = process.register(None, MIB)
    process.outcome("cuMemHostUnregister", buffer)
    process.fill_host(buffer, 1, size)
    process.outcome("cuMemcpyHtoDAsync", pointer, buffer, size, stream)
    process.fill_host(buffer, 2, size)
    process.outcome("cuStreamSynchronize", stream)
    assert process.read(pointer, 2) == "0101"


def test_the_default_stream_waits_for_those_that_heed_it(start: Start) -> None:
    process = start()
    pointer, buffer = process.call("cuMemAlloc", MIB), process.call("cuMemHostAlloc", MIB, 0)
    process.fill_host(buffer, 1, MIB)
    stream = process.call("cuStreamCreate", BLOCKING)
    process.outcome("cuMemcpyHtoDAsync", pointer, buffer, MIB, stream)
    assert process.read(pointer, 2) == "0101"
    process.outcome("cuMemsetD8Async", pointer, 2, 4, DEFAULT)
    process.outcome("cuMemsetD8Async", pointer + 1, 3, 1, stream)
    process.outcome("cuStreamSynchronize", stream)
    assert process.read(pointer, 3) == "020302"


@pytest.fixture(params=["cuMemCreate", "cuMemAlloc"])
def process_and_memory(request: pytest.FixtureRequest, start: Start) -> tuple[CudaProcess, int]:
    """A process, and the address of two granules that it has; of cuMemCreate's, each is mapped by itself."""
    process = start()
    if request.param == "cuMemAlloc":
        return process, process.call("cuMemAlloc", 2 * GRANULARITY)
    pointer = process.call("cuMemAddressReserve", 2 * GRANULARITY, 0, 0, 0)
    for at in (pointer, pointer + GRANULARITY):
        process.call("cuMemMap", at, GRANULARITY, 0, process.create(GRANULARITY), 0)
    process.allow(pointer, 2 * GRANULARITY, "PROT_READWRITE")
    return process, pointer


def test_new_memory_is_stale(process_and_memory: tuple[CudaProcess, int]) -> None:
    process, pointer = process_and_memory
    assert STALE != 0
    buffer = process.call("cuMemHostAlloc", 2 * GRANULARITY, 0)
    process.outcome("cuMemcpyDtoH", buffer, pointer, 2 * GRANULARITY)
    assert process.differing(buffer, STALE, 2 * GRANULARITY) == 0


def test_fills_and_copies_of_a_stream_are_done_in_order(
    kernel: KernelDriver, process_and_memory: tuple[CudaProcess, int]
) -> None:
    process, pointer = process_and_memory
    stream, size = process.call("cuStreamCreate", NON_BLOCKING), 2 * GRANULARITY
    ones, back, after = (process.call("cuMemHostAlloc", size, 0) for _ in range(3))
    process.fill_host(ones, 1, size)
    process.outcome("cuMemsetD8Async", pointer, 3, size, stream)
    process.outcome("cuMemcpyHtoDAsync", pointer, ones, GRANULARITY + 5, stream)
    process.outcome("cuMemcpyDtoHAsync", back, pointer, size, stream)
    process.outcome("cuMemsetD8Async", pointer + GRANULARITY - 4, 2, 8, stream)  # over two mappings, where there are
    process.outcome("cuMemcpyDtoHAsync", after, pointer, size, stream)
    process.outcome("cuMemsetD8Async", pointer + size - 1, 4, 1, stream)
    first = kernel.allocations()[0]
    assert kernel.read(first.number, 0, 1) == bytes([STALE])  # not waited for
    with kernel.devices[0].paused():
        process.begin("outcome", "cuStreamSynchronize", stream)
        wait_until(lambda: kernel.devices[0].copies == 1)
        assert kernel.read(first.number, 0, GRANULARITY) == b"\3" * GRANULARITY
    assert process.end() == "CUDA_SUCCESS"
    edge = GRANULARITY - 6
    assert process.read_host(back + edge, 14) == "01" * 11 + "03" * 3
    assert process.read_host(after + edge, 14) == "01" * 2 + "02" * 8 + "01" + "03" * 3
    assert process.read_host(after + size - 1, 1) == "03"
    assert process.read(pointer + edge, 14) == process.read_host(after + edge, 14)
    assert process.read(pointer + size - 2, 2) == "0304"


def test_fills_of_the_default_stream_are_done_in_order(kernel: KernelDriver, start: Start) -> None:
    process = start()
    pointer, buffer = process.call("cuMemAlloc", MIB), process.call("cuMemHostAlloc", MIB, 0)
    (allocation,) = kernel.allocations()
    process.fill_host(buffer, 1, MIB)
    process.outcome("cuMemcpyHtoDAsync", pointer, buffer, MIB, DEFAULT)
    for value in (2, 3):
        assert process.outcome("cuMemsetD8", pointer + value - 1, value, 4) == "CUDA_SUCCESS"
    assert kernel.read(allocation.number, 0, 1) == bytes([STALE])  # the host does not wait for fills either
    assert process.read(pointer, 7) == "01020303030301"


def test_what_fills_are_refused_for(process_and_memory: tuple[CudaProcess, int]) -> None:
    process, pointer = process_and_memory
    size = 2 * GRANULARITY
    for at, count in ((pointer, size + 1), (pointer - 1, 2)):
        assert process.outcome("cuMemsetD8", at, 1, count) == "CUDA_ERROR_INVALID_VALUE"
    assert process.read(pointer, 1) + process.read(pointer + size - 1, 1) == UNTOUCHED * 2


def test_a_failed_copy_is_told_of_when_it_is_waited_for(start: Start) -> None:
    process = start()
    size = 2 * MIB
    pointer = process.map(process.create(size), size, "PROT_READ")
    stream = process.call("cuStreamCreate", NON_BLOCKING)
    assert process.outcome("cuMemsetD8Async", pointer, 1, size, stream) == "CUDA_SUCCESS"
    assert process.outcome("cuStreamSynchronize", stream) == "CUDA_ERROR_ILLEGAL_ADDRESS"
    assert process.outcome("cuMemGetInfo") == "CUDA_ERROR_ILLEGAL_ADDRESS"


def test_a_copy_to_what_is_unmapped_meanwhile_fails(start: Start) -> None:
    process = start()
    size = 2 * MIB
    pointer, stream = process.map(process.create(size), size), process.call("cuStreamCreate", NON_BLOCKING)
    process.outcome("cuMemsetD8Async", pointer, 1, size, stream)
    process.unmap(pointer, size)
    assert process.outcome("cuStreamSynchronize", stream) == "CUDA_ERROR_ILLEGAL_ADDRESS"


def test_threads_at_once(kernel: KernelDriver, start: Start) -> None:
    assert start().threads(4, 25) == []
    assert kernel.devices[0].bytes_to_device == kernel.devices[0].bytes_to_host == 4 * 25 * 100_000


def test_copies_stand_still_and_go_on(kernel: KernelDriver, start: Start) -> None:
    process = start()
    device, pointer = kernel.devices[0], process.call("cuMemAlloc", MIB)
    with device.paused():
        process.begin("write", pointer, "01" * 4096)
        wait_until(lambda: device.copies == 1)
        assert device.bytes_to_device == 0
    process.end()
    assert device.bytes_to_device == 4096
    assert process.read(pointer + 4095, 2) == "01" + UNTOUCHED


@pytest.mark.parametrize("how", ["paused", "slow"])
def test_a_device_that_stands_still_leaves_others_alone(kernel: KernelDriver, start: Start, how: str) -> None:
    process = start(0)
    still, pointer = process.call("cuCtxGetCurrent"), process.call("cuMemAlloc", MIB)
    process.start(1)
    theirs, buffer = process.call("cuMemAlloc", 8 * MIB), process.call("cuMemHostAlloc", 8 * MIB, 0)
    stream = process.call("cuStreamCreate", NON_BLOCKING)
    with ExitStack() as stack:
        if how == "paused":
            stack.enter_context(kernel.devices[0].paused())
        else:
            kernel.devices[0].slow(seconds_per_copy=1000)
            stack.callback(kernel.devices[0].slow)
        process.aside(still, "write", pointer, "01" * 4096)
        wait_until(lambda: kernel.devices[0].copies == 1)
        process.fill_host(buffer, 2, 8 * MIB)
        process.outcome("cuMemcpyHtoDAsync", theirs, buffer, 8 * MIB, stream)
        for name in ("cuStreamSynchronize", "cuStreamDestroy"):
            assert process.outcome(name, stream) == "CUDA_SUCCESS"
        process.write(theirs, "03")
        assert process.read(theirs, 2) == "0302"
        assert process.outcome("cuCtxSynchronize") == "CUDA_SUCCESS"
        for name, what in (("cuMemFree", theirs), ("cuMemFreeHost", buffer), ("cuDevicePrimaryCtxRelease", 1)):
            assert process.outcome(name, what) == "CUDA_SUCCESS"
        assert (kernel.devices[0].bytes_to_device, kernel.devices[1].bytes_to_device) == (0, 8 * MIB + 1)
    process.joined()
    assert kernel.devices[0].bytes_to_device == 4096


def test_copies_within_two_devices_at_once(kernel: KernelDriver, start: Start) -> None:
    process = start(0)
    contexts, pointers = [], []
    for device in (0, 1):
        process.start(device)
        contexts.append(process.call("cuCtxGetCurrent"))
        pointers.append(process.call("cuMemAlloc", 8 * MIB))
        process.outcome("cuMemsetD8", pointers[device], 1 + device, 4 * MIB)
        kernel.devices[device].slow(seconds_per_mib=0.02)
    for device in (0, 1):
        process.outcome("cuCtxSetCurrent", contexts[device])
        process.outcome("cuMemcpyDtoD", pointers[device] + 4 * MIB, pointers[device], 4 * MIB)
        process.aside(contexts[device], "read", pointers[device] + 8 * MIB - 2, 2)
    assert sorted(process.joined()) == ["0101", "0202"]
    for device, (allocation,) in enumerate(device.allocations() for device in kernel.devices):
        assert kernel.read(allocation.number, 0, 8 * MIB) == bytes([1 + device]) * (8 * MIB)


def test_copies_can_be_caught_in_the_middle(kernel: KernelDriver, start: Start) -> None:
    process = start()
    device, buffer = kernel.devices[0], process.call("cuMemHostAlloc", 8 * MIB, 0)
    pointer, other = process.call("cuMemAlloc", 8 * MIB), start()
    theirs = other.ipc_open(process.ipc_handle(pointer))
    process.fill_host(buffer, 1, 8 * MIB)
    device.slow(seconds_per_mib=2)
    process.begin("outcome", "cuMemcpyHtoD", pointer, buffer, 8 * MIB)
    wait_until(lambda: device.bytes_to_device > 0)
    (allocation,) = device.allocations()
    assert kernel.read(allocation.number, 0, 2) + kernel.read(allocation.number, 8 * MIB - 2, 2) == bytes(
        [1, 1, STALE, STALE]
    )
    device.slow()
    assert process.end() == "CUDA_SUCCESS"
    assert other.read(theirs + 8 * MIB - 2, 2) == "0101"


def test_a_device_that_is_lost_ends_copies(kernel: KernelDriver, start: Start) -> None:
    process = start()
    pointer = process.call("cuMemAlloc", MIB)
    with kernel.devices[0].paused():
        process.begin("write", pointer, "01" * 4096)
        wait_until(lambda: kernel.devices[0].copies == 1)
        kernel.devices[0].lose()
        with pytest.raises(CudaError, match="CUDA_ERROR_UNKNOWN"):
            process.end()


@pytest.fixture
def on_disk(tmp_path: Path) -> Iterator[Path]:
    """A file that is not on a tmpfs, which a directory for temporary files may be."""
    types = {part[1]: part[2] for part in map(str.split, Path("/proc/mounts").read_text().splitlines())}
    for directory in (tmp_path, Path("/var/tmp")):
        above = next(str(path) for path in (directory, *directory.parents) if str(path) in types)
        if types[above] != "tmpfs":
            with tempfile.NamedTemporaryFile(dir=directory) as file:
                file.truncate(MIB)
                yield Path(file.name)
                return
    pytest.skip("no directory that is not in memory")


def test_which_host_memory_can_be_locked(start: Start, on_disk: Path) -> None:
    process = start()
    address = process.register(None, MIB)
    assert process.outcome("cuMemHostRegister", address + 4096, 4096, 0) == "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
    assert process.outcome("cuMemHostUnregister", address) == "CUDA_SUCCESS"
    assert process.outcome("cuMemHostUnregister", address) == "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"
    memory = os.memfd_create("model")
    os.ftruncate(memory, MIB)
    place = f"/proc/{os.getpid()}/fd/{memory}"
    process.register(place, MIB)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        process.register(place, MIB, writable=False)
    process.register(place, MIB, writable=False, flags=8)
    os.close(memory)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        process.register(str(on_disk), MIB)
