"""The emulated driver: memory that processes share, the older way and by descriptors, and what becomes of it."""

import os
import signal
import socket
from collections.abc import Iterator

import pytest

from . import GRANULARITY, STALE, KernelDriver
from .processes import CudaError, CudaProcess, EndedError, Start
from .registers import Message, Verb

MIB = 1 << 20
UNTOUCHED = f"{STALE:02x}"


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


def test_older_handles_share_memory(kernel: KernelDriver, owner: CudaProcess, start: Start) -> None:
    other = start()
    pointer = owner.call("cuMemAlloc", MIB)
    handle = owner.ipc_handle(pointer)
    theirs = other.ipc_open(handle)
    owner.write(pointer, "0102")
    assert other.read(theirs, 3) == "0102" + UNTOUCHED
    other.write(theirs + 2, "03")
    assert owner.read(pointer, 3) == "010203"
    (allocation,) = kernel.allocations()
    assert (allocation.owner, allocation.mappings, allocation.exportable) == (owner.pid, 2, False)
    assert allocation.holders == tuple(sorted([owner.pid, other.pid]))
    assert other.attribute("IS_LEGACY_CUDA_IPC_CAPABLE", theirs) == 0


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
    assert other.outcome("cuMemFree", theirs) == "CUDA_ERROR_INVALID_VALUE"
    for outcome in ("CUDA_SUCCESS", "CUDA_SUCCESS", "CUDA_ERROR_INVALID_VALUE"):
        assert other.outcome("cuIpcCloseMemHandle", theirs) == outcome
    assert other.read(other.ipc_open(handle), 1) == UNTOUCHED


def test_what_older_handles_are_refused_for(owner: CudaProcess, start: Start) -> None:
    other = start()
    pointer = owner.call("cuMemAlloc", MIB)
    handle = owner.ipc_handle(pointer)
    with pytest.raises(CudaError, match="INVALID_CONTEXT"):
        owner.ipc_open(handle)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        other.ipc_open("00" * 64)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        other.ipc_handle(other.ipc_open(handle))
    with pytest.raises(CudaError, match="PEER_ACCESS_UNSUPPORTED"):
        start(1).ipc_open(handle)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        owner.ipc_handle(owner.map(owner.create(GRANULARITY), GRANULARITY))
    owner.outcome("cuMemFree", pointer)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        start().ipc_open(handle)


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
    assert other.outcome("cuMemAlloc", MIB) == "CUDA_ERROR_ILLEGAL_ADDRESS"  # stays: the process has to start anew
    with pytest.raises(EndedError, match=str(-signal.SIGBUS)):
        third.read_host(mapped, 1)


def test_a_descriptor_shares_memory(kernel: KernelDriver, shared: tuple[int, int], start: Start) -> None:
    other = start()
    theirs = opened(other, shared[1])
    assert other.read(theirs + GRANULARITY, 4) == "010203" + UNTOUCHED
    (allocation,) = kernel.allocations()
    assert (allocation.nbytes, allocation.mappings, allocation.exports) == (2 * GRANULARITY, 2, 1)
    other.unmap(theirs, 2 * GRANULARITY)
    (allocation,) = kernel.allocations()
    assert (len(allocation.holders), allocation.mappings) == (1, 1)


def test_read_only_means_it(owner: CudaProcess, shared: tuple[int, int], start: Start) -> None:
    other = start()
    theirs = opened(other, shared[1])
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        other.write(theirs + GRANULARITY, "ff")
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        other.read(theirs, 1)
    assert owner.read(shared[0] + GRANULARITY, 3) == "010203"


def test_the_host_faults_where_the_device_would(owner: CudaProcess, shared: tuple[int, int], start: Start) -> None:
    other = start(transparent=True)
    theirs = opened(other, shared[1])
    assert other.read_host(theirs + GRANULARITY, 3) == "010203"
    with pytest.raises(EndedError, match=str(-signal.SIGSEGV)):
        other.fill_host(theirs, 0xFF, 1)
    third = start(transparent=True)
    writable = opened(third, shared[1], "PROT_READWRITE")
    third.fill_host(writable, 0xFF, 1)
    assert owner.read(shared[0], 2) == "ff" + UNTOUCHED
    third.allow(writable, 2 * GRANULARITY, "PROT_NONE")
    with pytest.raises(EndedError, match=str(-signal.SIGSEGV)):
        third.read_host(writable, 1)


def test_memory_outlives_its_owner_while_somebody_has_it(
    kernel: KernelDriver, owner: CudaProcess, shared: tuple[int, int], start: Start
) -> None:
    other = start()
    theirs = opened(other, shared[1])
    owner.kill()
    assert other.read(theirs + GRANULARITY, 3) == "010203"
    (allocation,) = kernel.allocations()
    assert allocation.holders == (other.pid,)


def test_memory_outlives_its_owner_while_a_descriptor_is_open_anywhere(
    kernel: KernelDriver, owner: CudaProcess, start: Start
) -> None:
    """As a keeper has it, which knows nothing of CUDA."""
    handle = owner.create(GRANULARITY)
    pointer = owner.map(owner.call("cuMemRetainAllocationHandle", owner.map(handle, GRANULARITY)), GRANULARITY)
    owner.write(pointer, "0102")
    descriptor = owner.export(owner.call("cuMemRetainAllocationHandle", pointer))
    again = os.dup(descriptor)
    os.close(descriptor)
    owner.kill()
    other = start()
    assert kernel.devices[0].used == GRANULARITY
    theirs = other.map(other.import_(descriptors=(again,)), GRANULARITY)
    assert other.read(theirs, 2) == "0102"
    other.kill()
    (allocation,) = kernel.allocations()
    assert (allocation.holders, allocation.exports) == ((), 1)
    os.close(again)
    assert kernel.allocations() == []


def test_room_is_there_as_soon_as_the_last_descriptor_is_closed(owner: CudaProcess, start: Start) -> None:
    handle = owner.create(60 * MIB)
    descriptor = owner.export(handle)
    owner.outcome("cuMemRelease", handle)
    other = start()
    with pytest.raises(CudaError, match="OUT_OF_MEMORY"):
        other.create(60 * MIB)
    os.close(descriptor)
    other.create(60 * MIB)


def test_what_virtual_memory_management_refuses(owner: CudaProcess) -> None:
    assert owner.granularity() == GRANULARITY
    for size in (0, GRANULARITY - 1, GRANULARITY + 4096):
        with pytest.raises(CudaError, match="INVALID_VALUE"):
            owner.create(size)
    private, handle = owner.create(GRANULARITY, exportable=False), owner.create(GRANULARITY)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        owner.export(private)
    with pytest.raises(CudaError, match="INVALID_DEVICE"):
        owner.map(private, GRANULARITY, "PROT_READ") and owner.create(GRANULARITY, 7)
    pointer = owner.call("cuMemAddressReserve", 4 * GRANULARITY, 0, 0, 0)
    for where, size, offset in ((1, 1, 0), (0, 2, 0), (4, 1, 0), (0, 1, 1)):
        arguments = (pointer + where * GRANULARITY - (where == 1), size * GRANULARITY, offset, handle, 0)
        assert owner.outcome("cuMemMap", *arguments) == "CUDA_ERROR_INVALID_VALUE"
    assert owner.outcome("cuMemMap", pointer, GRANULARITY, 0, handle, 0) == "CUDA_SUCCESS"
    assert owner.outcome("cuMemMap", pointer, GRANULARITY, 0, handle, 0) == "CUDA_ERROR_INVALID_VALUE"
    assert owner.outcome("cuMemMap", pointer + GRANULARITY, GRANULARITY, 0, handle, 0) == "CUDA_SUCCESS"
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        owner.allow(pointer, 3 * GRANULARITY, "PROT_READ")
    with pytest.raises(CudaError, match="INVALID_DEVICE"):
        owner.allow(pointer, GRANULARITY, "PROT_READ", 1)
    owner.allow(pointer, 2 * GRANULARITY, "PROT_READWRITE")
    owner.write(pointer + GRANULARITY - 1, "0102")  # over two mappings of the same memory
    assert owner.read(pointer, 1) == "02"
    assert owner.outcome("cuMemUnmap", pointer, GRANULARITY // 2) == "CUDA_ERROR_INVALID_VALUE"
    assert owner.outcome("cuMemAddressFree", pointer, 4 * GRANULARITY) == "CUDA_ERROR_INVALID_VALUE"
    assert owner.outcome("cuMemUnmap", pointer, 2 * GRANULARITY) == "CUDA_SUCCESS"
    assert owner.outcome("cuMemUnmap", pointer, 2 * GRANULARITY) == "CUDA_ERROR_INVALID_VALUE"
    assert owner.outcome("cuMemAddressFree", pointer, 4 * GRANULARITY) == "CUDA_SUCCESS"


def test_mapped_memory_stays_without_its_handle(kernel: KernelDriver, owner: CudaProcess) -> None:
    pointer = owner.map(owner.create(GRANULARITY), GRANULARITY)
    owner.write(pointer, "01")
    assert kernel.devices[0].used == GRANULARITY
    owner.unmap(pointer, GRANULARITY)
    assert kernel.allocations() == []


def test_access_has_to_be_given(owner: CudaProcess) -> None:
    pointer = owner.map(owner.create(GRANULARITY), GRANULARITY, "PROT_NONE")
    with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
        owner.read(pointer, 1)


def test_a_descriptor_of_something_else_is_none(owner: CudaProcess) -> None:
    with open("/dev/null") as other, pytest.raises(CudaError, match="INVALID_VALUE"):
        owner.import_(descriptors=(other.fileno(),))
