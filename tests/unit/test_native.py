"""Arrays made in C: what they are over is told of once as unused, after the last of them."""

import ctypes
import itertools
import threading
import time

import pytest

from tests.fuzz.params import Record
from trimsfs.client.native import library


class Managed(ctypes.Structure):
    """DLPack's DLManagedTensor."""


Deleter = ctypes.CFUNCTYPE(None, ctypes.POINTER(Managed))
Managed._fields_ = (
    ("data", ctypes.c_void_p),
    *((name, ctypes.c_int32) for name in ("device", "device_number", "dimensions")),
    *((name, ctypes.c_uint8) for name in ("code", "bits")),
    ("lanes", ctypes.c_uint16),
    ("shape", ctypes.POINTER(ctypes.c_int64)),
    ("strides", ctypes.c_void_p),
    ("offset", ctypes.c_uint64),
    ("context", ctypes.c_void_p),
    ("deleter", Deleter),
)
Make = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Managed), ctypes.c_int, ctypes.c_void_p)
NUMBERS = itertools.count(1)


class Framework:
    """Makes arrays of what it is given, *most* of them, and tells when they are gone."""

    def __init__(self, most: int) -> None:
        self.made: list[Managed] = []
        self.shapes: list[list[int]] = []
        self.number = next(NUMBERS)
        self._most = most
        self._function = Make(self._make)

    def lend(self, shapes: list[tuple[int, ...]]) -> int:
        kept = [(ctypes.c_int64 * len(shape))(*shape) for shape in shapes]
        records = (Record * len(shapes))()
        for record, shape in zip(records, kept, strict=True):
            record.data, record.shape, record.dimensions = 0x5000, ctypes.addressof(shape), len(shape)
            record.code, record.bits = 2, 32
        handles = (ctypes.c_void_p * len(shapes))()
        make = ctypes.cast(self._function, ctypes.c_void_p)
        made: int = library().trimsfs_lend(records, len(shapes), make, self.number, handles)
        return made

    def free(self, number: int) -> None:
        self.made[number].deleter(ctypes.byref(self.made[number]))

    def _make(self, managed: "ctypes._Pointer[Managed]", transient: int, _handle: int) -> int:
        assert transient == 1
        if len(self.made) == self._most:
            return -1
        copy = Managed.from_buffer_copy(managed.contents)
        self.made.append(copy)
        self.shapes.append([copy.shape[number] for number in range(copy.dimensions)])
        return 0


def unused(most: int = 100) -> list[int]:
    """Numbers that are told, in order."""
    numbers = (ctypes.c_uint64 * most)()
    return sorted(numbers[: library().trimsfs_unused(numbers, most)])


def test_what_they_are_over_is_unused_after_the_last() -> None:
    framework = Framework(most=3)
    assert framework.lend([(2, 3), (4,), (1, 1, 7)]) == 3
    assert framework.shapes == [[2, 3], [4], [1, 1, 7]]
    assert {(each.data, each.code, each.bits, each.lanes, each.device) for each in framework.made} == {
        (0x5000, 2, 32, 1, 1)
    }
    for number in (2, 0):
        framework.free(number)
    assert unused() == []
    framework.free(1)
    assert unused() == [framework.number]
    assert unused() == []


def test_without_arrays_it_is_unused_at_once() -> None:
    framework = Framework(most=0)
    assert (framework.lend([]), unused()) == (0, [framework.number])


@pytest.mark.parametrize(
    "shapes",
    [pytest.param([(1,)] * 3, id="the framework fails"), pytest.param([(1,), (1,) * 33], id="too many dimensions")],
)
def test_after_a_failure_what_was_made_is_freed_and_the_rest_stays(shapes: list[tuple[int, ...]]) -> None:
    framework = Framework(most=1)
    assert framework.lend(shapes) == 1
    framework.free(0)
    assert unused() == []  # whether the one that failed is told of as gone later is not known


def test_each_is_told_once_whoever_asks() -> None:
    frameworks = [Framework(most=1) for _ in range(200)]
    told: list[int] = []
    for framework in frameworks:
        framework.lend([(1,)])

    def ask() -> None:
        end = time.monotonic() + 10
        while len(told) < len(frameworks) and time.monotonic() < end:
            told.extend(unused(3))

    asking = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in asking:
        thread.start()
    for framework in frameworks:
        framework.free(0)
    for thread in asking:
        thread.join(10)
    assert sorted(told) == [framework.number for framework in frameworks]
