"""The emulated driver: devices, contexts, and memory that all processes of a device have in common."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mounts import wait_until

from . import STALE, KernelDriver, Result, environment
from .processes import CudaError, EndedError, Start, cuda_process

MIB = 1 << 20


def test_devices_say_that_they_are_emulated(kernel: KernelDriver, start: Start) -> None:
    devices = start(None).devices()
    assert [(name, size) for name, _, size in devices] == [
        ("Emulated device 0, no GPU", 64 * MIB),
        ("Emulated device 1, no GPU", 32 * MIB),
    ]
    assert [uuid for _, uuid, _ in devices] == [
        device.uuid.removeprefix("GPU-").replace("-", "") for device in kernel.devices
    ]
    assert kernel.devices[0].uuid != kernel.devices[1].uuid


@pytest.mark.parametrize(
    ("visible", "seen"), [("1", [1]), ("1,0", [1, 0]), ("0,7,1", [0]), ("uuid", [1]), ("uuid,0", [1, 0]), ("0,0", [0])]
)
def test_visible_devices(kernel: KernelDriver, start: Start, visible: str, seen: list[int]) -> None:
    named = visible.replace("uuid", kernel.devices[1].uuid)
    devices = start(None, {"CUDA_VISIBLE_DEVICES": named}).devices()
    assert [name for name, _, _ in devices] == [kernel.devices[number].name for number in seen]


@pytest.mark.parametrize("variables", [{"EMULATED_CUDA": "/nowhere"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_there_may_be_no_device(start: Start, variables: dict[str, str]) -> None:
    with pytest.raises(CudaError, match="CUDA_ERROR_NO_DEVICE"):
        start(None, variables).init()


def test_a_driver_without_devices() -> None:
    with cuda_process(environment(None)) as process, pytest.raises(CudaError, match="CUDA_ERROR_NO_DEVICE"):
        process.init()


def test_nothing_works_before_it_is_initialised_or_without_a_context(start: Start) -> None:
    process = start(None)
    assert process.outcome("cuDeviceGetCount") == "CUDA_ERROR_NOT_INITIALIZED"
    process.init()
    assert process.outcome("cuMemAlloc", 4096) == "CUDA_ERROR_INVALID_CONTEXT"
    assert process.outcome("cuDevicePrimaryCtxRetain", 2) == "CUDA_ERROR_INVALID_DEVICE"
    process.start()
    assert process.outcome("cuMemAlloc", 4096) == "CUDA_SUCCESS"
    assert process.thread_context() == "CUDA_ERROR_INVALID_CONTEXT"


def test_a_context_takes_its_allocations_with_it(kernel: KernelDriver, start: Start) -> None:
    process = start()
    process.call("cuMemAlloc", MIB)
    kept = process.create(2 * MIB)
    assert kernel.devices[0].used == 3 * MIB
    assert process.outcome("cuDevicePrimaryCtxRelease", 0) == "CUDA_SUCCESS"
    assert process.outcome("cuMemAlloc", MIB) == "CUDA_ERROR_CONTEXT_IS_DESTROYED"
    assert process.outcome("cuDevicePrimaryCtxRelease", 0) == "CUDA_ERROR_INVALID_CONTEXT"
    assert [allocation.nbytes for allocation in kernel.allocations()] == [2 * MIB]
    assert process.outcome("cuMemRelease", kept) == "CUDA_SUCCESS"
    assert kernel.allocations() == []


def test_after_a_fork_the_child_has_nothing(kernel: KernelDriver, start: Start) -> None:
    process = start()
    pointer = process.call("cuMemAlloc", MIB)
    assert process.fork() == ["CUDA_ERROR_NOT_INITIALIZED"] * 2
    process.write(pointer, "01")
    child = process.fork_and_stay()
    process.kill()
    try:
        assert kernel.allocations() == []  # the child does not keep the connection
    finally:
        os.kill(child, signal.SIGKILL)


def test_processes_share_the_memory_of_a_device(kernel: KernelDriver, start: Start) -> None:
    one, other = start(), start()
    one.call("cuMemAlloc", 30 * MIB)
    kernel.devices[0].others = 10 * MIB
    assert other.call("cuMemGetInfo") == [24 * MIB, 64 * MIB]
    assert other.outcome("cuMemAlloc", 25 * MIB) == "CUDA_ERROR_OUT_OF_MEMORY"
    with pytest.raises(CudaError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        other.create(26 * MIB)
    other.create(24 * MIB)
    assert kernel.devices[0].used == 54 * MIB
    assert start(1).call("cuMemGetInfo") == [32 * MIB, 32 * MIB]
    assert kernel.processes[:2] == sorted([one.pid, other.pid])


def test_a_process_that_is_killed_gives_back_what_it_had(kernel: KernelDriver, start: Start) -> None:
    process, other = start(), start()
    process.call("cuMemAlloc", 20 * MIB)
    process.map(process.create(20 * MIB), 20 * MIB)
    assert other.outcome("cuMemAlloc", 60 * MIB) == "CUDA_ERROR_OUT_OF_MEMORY"
    process.kill()
    assert other.outcome("cuMemAlloc", 60 * MIB) == "CUDA_SUCCESS"
    assert [allocation.owner for allocation in kernel.allocations()] == [other.pid]


def test_what_is_freed_twice_or_never_was_is_an_error(kernel: KernelDriver, start: Start) -> None:
    process = start()
    pointer = process.call("cuMemAlloc", MIB)
    assert process.call("cuMemGetAddressRange", pointer + 100) == [pointer, MIB]
    assert process.outcome("cuMemFree", pointer + 100) == "CUDA_ERROR_INVALID_VALUE"
    for outcome in ("CUDA_SUCCESS", "CUDA_ERROR_INVALID_VALUE"):
        assert process.outcome("cuMemFree", pointer) == outcome
    handle = process.create(2 * MIB)
    for outcome in ("CUDA_SUCCESS", "CUDA_ERROR_INVALID_VALUE"):
        assert process.outcome("cuMemRelease", handle) == outcome
    stream = process.call("cuStreamCreate", 0)
    for outcome in ("CUDA_SUCCESS", "CUDA_ERROR_INVALID_HANDLE"):
        assert process.outcome("cuStreamDestroy", stream) == outcome
    assert process.outcome("cuStreamSynchronize", 12345) == "CUDA_ERROR_INVALID_HANDLE"
    assert process.outcome("cuCtxSetCurrent", 12345) == "CUDA_ERROR_INVALID_CONTEXT"
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        process.write(pointer, "01")
    assert process.outcome("cuMemAlloc", 0) == "CUDA_ERROR_INVALID_VALUE"
    assert kernel.allocations() == []


def test_nothing_lies_behind_the_end_of_an_allocation(kernel: KernelDriver, start: Start) -> None:
    process = start()
    pointer = process.call("cuMemAlloc", 1000)
    assert (process.call("cuMemGetAddressRange", pointer), kernel.devices[0].used) == ([pointer, 1000], 4096)
    process.write(pointer + 999, "01")
    for where in (pointer + 999, pointer + 1000, pointer - 1):
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            process.write(where, "0102")


def test_a_lost_device(kernel: KernelDriver, start: Start) -> None:
    process, other = start(0), start(1)
    pointer, theirs = process.call("cuMemAlloc", MIB), other.call("cuMemAlloc", MIB)
    descriptor = process.export(process.create(2 * MIB))
    kernel.devices[0].lose(Result.DEVICE_UNAVAILABLE)
    assert process.outcome("cuMemGetInfo") == "CUDA_ERROR_DEVICE_UNAVAILABLE"
    other.write(theirs, "01")
    assert [name for name, _, _ in start(None).devices()] == ["Emulated device 1, no GPU"]
    kernel.devices[0].restore()
    with pytest.raises(CudaError, match="DEVICE_UNAVAILABLE"):
        process.read(pointer, 1)
    later = start(0)
    assert later.call("cuMemGetInfo") == [64 * MIB, 64 * MIB]
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        later.import_(descriptors=(descriptor,))
    os.close(descriptor)


def test_the_host_faults_on_device_pointers(start: Start) -> None:
    process = start()
    with pytest.raises(EndedError, match=str(-signal.SIGSEGV)):
        process.read_host(process.call("cuMemAlloc", MIB), 1)
    process = start(transparent=True)
    pointer = process.call("cuMemAlloc", MIB)
    process.write(pointer, "0102")
    assert process.read_host(pointer, 3) == f"0102{STALE:02x}"


def test_a_byte_can_be_flipped(kernel: KernelDriver, start: Start) -> None:
    process = start()
    pointer = process.call("cuMemAlloc", MIB)
    process.write(pointer, "000102")
    (allocation,) = kernel.devices[0].allocations()
    kernel.flip(allocation.number, 1)
    assert process.read(pointer, 3) == kernel.read(allocation.number, 0, 3).hex() == "00fe02"


def test_what_is_known_of_a_pointer(kernel: KernelDriver, start: Start) -> None:
    process = start(1)
    pointer, host = process.call("cuMemAlloc", MIB), process.call("cuMemHostAlloc", MIB, 0)
    assert [process.attribute(name, pointer + 5) for name in ("MEMORY_TYPE", "DEVICE_ORDINAL")] == [2, 1]
    assert process.attribute("RANGE_START_ADDR", pointer + 5) == pointer
    assert process.attribute("RANGE_SIZE", pointer + 5) == MIB
    assert process.attribute("CONTEXT", pointer) == process.call("cuCtxGetCurrent")
    assert process.attribute("MEMORY_TYPE", host) == 1
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        process.attribute("MEMORY_TYPE", 4096)
    assert kernel.devices[1].used == MIB


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_confined_server_can_use_it(start: Start) -> None:
    server, client = start(None), start()
    server.confine(60874)
    server.start()
    handle = server.create(2 * MIB)
    descriptor = server.export(handle)
    server.write(server.map(handle, 2 * MIB), "0102")
    assert client.read(client.map(client.import_(descriptors=(descriptor,)), 2 * MIB), 2) == "0102"
    os.close(descriptor)


def test_it_serves_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.cuda", "--memory", "64MiB", "--transparent", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert select.select([server.stdout], [], [], 30)[0]
            lines = [server.stdout.readline() for _ in range(3)]
            given = dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
            with cuda_process(given) as process:
                assert [size for _, _, size in process.devices()] == [64 * MIB]
        finally:
            server.send_signal(signal.SIGINT)
    wait_until(lambda: not list(tmp_path.glob("*.sock")), 10)
