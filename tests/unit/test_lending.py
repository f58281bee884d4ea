"""Arrays made in C: what they are over is given back once, after the last of them."""

import ctypes
from typing import Any

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
CONTEXT = 0x1234


class Framework:
    """Makes arrays of what it is given, *most* of them, and tells when they are gone."""

    def __init__(self, most: int) -> None:
        self.made: list[Managed] = []
        self.shapes: list[list[int]] = []
        self.given_back: list[int] = []
        self._most = most
        self._functions: list[Any] = [Make(self._make), Deleter(self._deleted)]

    def lend(self, shapes: list[tuple[int, ...]]) -> int:
        kept = [(ctypes.c_int64 * len(shape))(*shape) for shape in shapes]
        records = (Record * len(shapes))()
        for record, shape in zip(records, kept, strict=True):
            record.data, record.shape, record.dimensions = 0x5000, ctypes.addressof(shape), len(shape)
            record.code, record.bits = 2, 32
        handles = (ctypes.c_void_p * len(shapes))()
        make, deleter = (ctypes.cast(function, ctypes.c_void_p) for function in self._functions)
        made: int = library().trimsfs_lend(records, len(shapes), make, CONTEXT, deleter, handles)
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

    def _deleted(self, managed: "ctypes._Pointer[Managed]") -> None:
        self.given_back.append(managed.contents.context)


def test_what_they_are_over_is_given_back_after_the_last() -> None:
    framework = Framework(most=3)
    assert framework.lend([(2, 3), (4,), (1, 1, 7)]) == 3
    assert framework.shapes == [[2, 3], [4], [1, 1, 7]]
    assert {(each.data, each.code, each.bits, each.lanes, each.device) for each in framework.made} == {
        (0x5000, 2, 32, 1, 1)
    }
    for number in (2, 0):
        framework.free(number)
    assert framework.given_back == []
    framework.free(1)
    assert framework.given_back == [CONTEXT]


def test_without_arrays_it_is_given_back_at_once() -> None:
    framework = Framework(most=0)
    assert (framework.lend([]), framework.given_back) == (0, [CONTEXT])


@pytest.mark.parametrize(
    "shapes",
    [pytest.param([(1,)] * 3, id="the framework fails"), pytest.param([(1,), (1,) * 33], id="too many dimensions")],
)
def test_after_a_failure_what_was_made_is_freed_and_the_rest_stays(shapes: list[tuple[int, ...]]) -> None:
    framework = Framework(most=1)
    assert framework.lend(shapes) == 1
    framework.free(0)
    assert framework.given_back == []  # whether the one that failed is told of as gone later is not known
