"""The emulated driver is as strict as a true one: what the tests of GPUs would not see with a more lenient one."""

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.mounts import wait_until
from tests.support.sanitizers import SANITIZE, reported, sanitized

from . import GRANULARITY, STALE, KernelDriver, environment, library
from .processes import CudaError, CudaProcess, EndedError, cuda_process
from .registers import Message, Verb

MIB = 1 << 20
UNTOUCHED = f"{STALE:02x}"
NON_BLOCKING = 1
Start = Callable[..., CudaProcess]


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
            device: int | None = 0, variables: dict[str, str] | None = None, *, transparent: bool = False
        ) -> CudaProcess:
            given = environment(kernel, transparent=transparent) | (variables or {})
            process = stack.enter_context(cuda_process(given))
            if device is not None:
                process.start(device)
            return process

        yield started


@pytest.fixture
def owner(start: Start) -> CudaProcess:
    return start()


@pytest.fixture
def shared(owner: CudaProcess) -> Iterator[tuple[int, int]]:
    """Two granules with some bytes in them: their address in the owner, and a descriptor, held here."""
    handle = owner.create(2 * GRANULARITY)
    descriptor = owner.export(handle)
    pointer = owner.map(handle, 2 * GRANULARITY)
    owner.write(pointer + GRANULARITY, "010203")
    yield pointer, descriptor
    os.close(descriptor)


def opened(process: CudaProcess, descriptor: int, access: str = "PROT_READ") -> int:
    """The address of what is shared so, in another process."""
    pointer: int = process.map(process.import_(descriptors=(descriptor,)), 2 * GRANULARITY, access)
    return pointer


# Devices


@pytest.mark.parametrize(
    ("visible", "seen"), [("0,1", [0, 1]), ("1,0", [1, 0]), ("0,7,1", [0]), ("uuid", [1]), ("uuid,0", [1, 0])]
)
def test_visible_devices(kernel: KernelDriver, start: Start, visible: str, seen: list[int]) -> None:
    process = start(None, {"CUDA_VISIBLE_DEVICES": visible.replace("uuid", kernel.devices[1].uuid)})
    devices = [(f"Emulated device {device.number}, no GPU", device.uuid, device.total) for device in kernel.devices]
    assert process.devices() == [list(devices[number]) for number in seen]


@pytest.mark.parametrize("variables", [{"EMULATED_CUDA": "/nowhere"}, {"CUDA_VISIBLE_DEVICES": ""}])
def test_there_may_be_no_device(start: Start, variables: dict[str, str]) -> None:
    assert start(None, variables).outcome("cuInit", 0) == "NO_DEVICE"


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


# What is refused


def test_nothing_works_before_it_is_initialised_or_without_a_context(start: Start) -> None:
    process = start(None)
    assert process.outcome("cuDeviceGetCount") == "NOT_INITIALIZED"
    process.call("cuInit", 0)
    assert process.outcome("cuMemAlloc", 4096) == "INVALID_CONTEXT"
    assert process.outcome("cuDevicePrimaryCtxRetain", 2) == "INVALID_DEVICE"


def test_what_is_freed_twice_or_never_was_is_an_error(kernel: KernelDriver, owner: CudaProcess) -> None:
    pointer, handle, stream = owner.call("cuMemAlloc", MIB), owner.create(2 * MIB), owner.call("cuStreamCreate", 0)
    assert owner.outcome("cuMemFree", pointer + 100) == "INVALID_VALUE"
    for function, what, error in (
        ("cuMemFree", pointer, "INVALID_VALUE"),
        ("cuMemRelease", handle, "INVALID_VALUE"),
        ("cuStreamDestroy", stream, "INVALID_HANDLE"),
    ):
        assert [owner.outcome(function, what) for _ in range(2)] == ["SUCCESS", error]
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        owner.write(pointer, "01")
    assert kernel.allocations() == []


def test_nothing_lies_behind_the_end_of_an_allocation(owner: CudaProcess) -> None:
    pointer = owner.call("cuMemAlloc", 1000)
    owner.write(pointer + 999, "01")
    for where in (pointer + 999, pointer + 1000, pointer - 1):
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            owner.write(where, "0102")


def test_what_virtual_memory_management_refuses(owner: CudaProcess) -> None:
    for size in (0, GRANULARITY - 1, GRANULARITY + 4096):
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            owner.create(size)
    handle, pointer = owner.create(GRANULARITY), owner.call("cuMemAddressReserve", 4 * GRANULARITY, 0, 0, 0)
    for where, size, offset in ((1, 1, 0), (0, 2, 0), (4, 1, 0), (0, 1, 1)):
        arguments = (pointer + where * GRANULARITY - (where == 1), size * GRANULARITY, offset, handle, 0)
        assert owner.outcome("cuMemMap", *arguments) == "INVALID_VALUE"
    calls = [("cuMemMap", pointer, GRANULARITY, 0, handle, 0), ("cuMemUnmap", pointer, GRANULARITY)]
    for call in calls:
        assert [owner.outcome(*call) for _ in range(2)] == ["SUCCESS", "INVALID_VALUE"]
    with open("/dev/null") as other, pytest.raises(CudaError, match="INVALID_VALUE"):
        owner.import_(descriptors=(other.fileno(),))
    without_access = owner.map(handle, GRANULARITY, "PROT_NONE")
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        owner.read(without_access, 1)


def test_what_older_handles_are_refused_for(owner: CudaProcess, start: Start) -> None:
    other, pointer = start(), owner.call("cuMemAlloc", MIB)
    handle = owner.ipc_handle(pointer)
    attempts: list[tuple[Callable[[], object], str]] = [
        (lambda: owner.ipc_open(handle), "INVALID_CONTEXT"),
        (lambda: other.ipc_open("00" * 64), "INVALID_VALUE"),
        (lambda: other.ipc_handle(other.ipc_open(handle)), "INVALID_VALUE"),
        (lambda: start(1).ipc_open(handle), "PEER_ACCESS_UNSUPPORTED"),
        (lambda: owner.ipc_handle(owner.map(owner.create(GRANULARITY), GRANULARITY)), "INVALID_VALUE"),
    ]
    for attempt, error in attempts:
        with pytest.raises(CudaError, match=error):
            attempt()
    owner.call("cuMemFree", pointer)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        start().ipc_open(handle)


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_which_files_can_be_locked_in_memory(owner: CudaProcess, place: str, tmp_path: Path) -> None:
    memory = os.memfd_create("model")
    path = tmp_path / "file" if place == "disk" else Path(f"/proc/{os.getpid()}/fd/{memory}")
    path.touch()
    os.truncate(path, MIB)
    if place == "memory":
        assert owner.register(str(path), MIB)
    else:
        if "tmpfs" in subprocess.run(["stat", "-f", "-c%T", path], capture_output=True, text=True, check=True).stdout:
            pytest.skip("the directory for temporary files is in memory")
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            owner.register(str(path), MIB)
    os.close(memory)


# Copies


def test_a_missing_synchronisation_shows(owner: CudaProcess) -> None:
    pointer, stream = owner.call("cuMemAlloc", MIB), owner.call("cuStreamCreate", NON_BLOCKING)
    buffer = owner.call("cuMemHostAlloc", MIB, 0)
    owner.fill_host(buffer, 1, MIB)
    owner.call("cuMemcpyHtoDAsync", pointer, buffer, MIB, stream)
    assert owner.read(pointer, 2) == UNTOUCHED * 2  # not waited for
    owner.fill_host(buffer, 2, MIB)  # used again too early
    owner.call("cuStreamSynchronize", stream)
    assert owner.read(pointer, 2) == "0202"
    owner.fill_host(buffer, 3, MIB)
    owner.call("cuMemcpyDtoHAsync", buffer, pointer, MIB, stream)
    assert owner.read_host(buffer, 2) == "0303"
    owner.call("cuCtxSynchronize")
    assert owner.read_host(buffer, 2) == "0202"


def test_fills_and_copies_of_a_stream_are_done_in_order(kernel: KernelDriver, owner: CudaProcess) -> None:
    size = 2 * GRANULARITY
    pointer, stream = owner.call("cuMemAlloc", size), owner.call("cuStreamCreate", NON_BLOCKING)
    ones, between = (owner.call("cuMemHostAlloc", size, 0) for _ in range(2))
    owner.fill_host(ones, 1, size)
    owner.call("cuMemsetD8Async", pointer, 3, size, stream)
    owner.call("cuMemcpyHtoDAsync", pointer, ones, GRANULARITY + 5, stream)
    owner.call("cuMemcpyDtoHAsync", between, pointer, size, stream)
    owner.call("cuMemsetD8Async", pointer + GRANULARITY + 4, 2, 2, stream)
    assert kernel.read(kernel.allocations()[0].number, 0, size) == bytes([STALE]) * size  # not waited for
    owner.call("cuStreamSynchronize", stream)
    edge = GRANULARITY + 3
    assert (owner.read_host(between + edge, 4), owner.read(pointer + edge, 4)) == ("01010303", "01020203")


@pytest.mark.parametrize("cause", ["read-only", "unmapped meanwhile"])
def test_a_failed_copy_is_told_of_when_it_is_waited_for(owner: CudaProcess, cause: str) -> None:
    access = "PROT_READ" if cause == "read-only" else "PROT_READWRITE"
    pointer = owner.map(owner.create(GRANULARITY), GRANULARITY, access)
    stream = owner.call("cuStreamCreate", NON_BLOCKING)
    owner.call("cuMemsetD8Async", pointer, 1, GRANULARITY, stream)
    if cause != "read-only":
        owner.unmap(pointer, GRANULARITY)
    assert owner.outcome("cuStreamSynchronize", stream) == "ILLEGAL_ADDRESS"
    assert owner.outcome("cuMemGetInfo") == "ILLEGAL_ADDRESS"  # stays: the process has to start anew


# Sharing


def test_who_has_died_before_the_answer_holds_nothing(kernel: KernelDriver, start: Start) -> None:
    with kernel._lock, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dying:
        dying.connect(str(kernel.path))
        dying.send(bytes(Message(what=Verb.ALLOCATE, size=MIB)))
    start()  # what was asked before has been answered
    assert kernel.allocations() == []


def test_older_handles_are_counted(owner: CudaProcess, start: Start) -> None:
    other = start()
    handle = owner.ipc_handle(owner.call("cuMemAlloc", MIB))
    theirs = other.ipc_open(handle)
    assert other.ipc_open(handle) == theirs
    assert other.outcome("cuMemFree", theirs) == "INVALID_VALUE"
    for outcome in ("SUCCESS", "SUCCESS", "INVALID_VALUE"):
        assert other.outcome("cuIpcCloseMemHandle", theirs) == outcome
    assert other.read(other.ipc_open(handle), 1) == UNTOUCHED


def test_importers_lose_what_was_allocated_the_older_way(
    kernel: KernelDriver, owner: CudaProcess, start: Start
) -> None:
    other, third = start(), start(transparent=True)
    handle = owner.ipc_handle(owner.call("cuMemAlloc", MIB))
    theirs, mapped = other.ipc_open(handle), third.ipc_open(handle)
    assert third.read_host(mapped, 1) == UNTOUCHED
    owner.kill()
    assert kernel.allocations() == []
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        other.read(theirs, 1)
    with pytest.raises(EndedError, match=str(-signal.SIGBUS)):
        third.read_host(mapped, 1)


def test_read_only_means_it(owner: CudaProcess, shared: tuple[int, int], start: Start) -> None:
    other, transparent = start(), start(transparent=True)
    theirs = opened(other, shared[1])
    assert other.read(theirs + GRANULARITY, 4) == "010203" + UNTOUCHED
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        other.write(theirs + GRANULARITY, "ff")
    theirs = opened(transparent, shared[1])
    assert transparent.read_host(theirs + GRANULARITY, 3) == "010203"
    with pytest.raises(EndedError, match=str(-signal.SIGSEGV)):
        transparent.fill_host(theirs, 0xFF, 1)
    assert owner.read(shared[0] + GRANULARITY, 3) == "010203"
    with pytest.raises(EndedError, match=str(-signal.SIGSEGV)):
        owner.read_host(shared[0], 1)


def test_memory_outlives_its_owner_while_a_process_or_a_descriptor_has_it(
    kernel: KernelDriver, owner: CudaProcess, shared: tuple[int, int], start: Start
) -> None:
    """A keeper, which knows nothing of CUDA, has a descriptor."""
    other, again = start(), os.dup(shared[1])
    theirs = opened(other, again)
    owner.kill()
    assert other.read(theirs + GRANULARITY, 3) == "010203"
    assert [allocation.holders for allocation in kernel.allocations()] == [(other.pid,)]
    other.kill()
    os.close(again)  # the fixture has another
    assert [allocation.holders for allocation in kernel.allocations()] == [()]
    third = start()
    assert third.read(opened(third, shared[1]) + GRANULARITY, 3) == "010203"


def test_room_is_there_as_soon_as_the_last_descriptor_is_closed(owner: CudaProcess, start: Start) -> None:
    handle = owner.create(60 * MIB)
    descriptor = owner.export(handle)
    owner.call("cuMemRelease", handle)
    other = start()
    with pytest.raises(CudaError, match="OUT_OF_MEMORY"):
        other.create(60 * MIB)
    os.close(descriptor)
    other.create(60 * MIB)


def test_it_is_clean_to_the_sanitizers(start: Start, tmp_path: Path) -> None:
    variables = sanitized(tmp_path / "sanitizer") | {"LD_LIBRARY_PATH": str(library(*SANITIZE).parent)}
    process, other = start(0, variables), start(0, variables)
    assert process.threads(3, 5) == []
    handle = process.create(2 * GRANULARITY)
    descriptor = process.export(handle)
    pointer = process.map(handle, 2 * GRANULARITY)
    theirs = opened(other, descriptor)
    os.close(descriptor)
    process.write(pointer, "01")
    assert other.read(theirs, 1) == "01"
    handle = process.ipc_handle(process.call("cuMemAlloc", GRANULARITY))
    assert other.ipc_open(handle) == other.ipc_open(handle)
    stream = process.call("cuStreamCreate", NON_BLOCKING)
    process.call("cuMemsetD8Async", pointer, 2, GRANULARITY, stream)
    process.call("cuStreamSynchronize", stream)
    assert other.read(theirs, 1) == "02"
    process.call("cuMemcpyDtoDAsync", pointer, pointer + 4096, 4096, stream)
    process.unmap(pointer, 2 * GRANULARITY)
    assert process.outcome("cuDevicePrimaryCtxReset", 0) == "SUCCESS"
    assert process.outcome("cuMemcpyDtoD", pointer, pointer, 1) == "CONTEXT_IS_DESTROYED"
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        other.write(theirs, "01")
    assert reported(tmp_path) == ""
