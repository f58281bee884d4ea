"""Capsules: what is in them, and that they keep what they are over until their taker needs it no more."""

import ctypes
import gc
import math
import subprocess
import sys
import weakref

import pytest

from tests.gpu.capsules import Owner, content, made, take
from trimsfs.extras.gpu.client.dlpack import capsule
from trimsfs.formats import DTYPE_BITS

BOTH = pytest.mark.parametrize("versioned", [False, True], ids=["plain", "versioned"])
CODES = [  # as DLPack numbers them
    (0, "int4 int8 int16 int32 int64"),
    (1, "uint4 uint8 uint16 uint32 uint64"),
    (2, "float16 float32 float64"),
    (4, "bfloat16"),
    (5, "complex64 complex128"),
    (6, "bool"),
    *enumerate(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 10),
    *enumerate(("float6_e2m3fn", "float6_e3m2fn", "float4_e2m1fn"), 15),
]


@BOTH
def test_a_capsule_tells_of_a_dense_tensor(versioned: bool) -> None:
    found = capsule(None, 0x5000, "float16", (4, 1, 0, 3), (2, 7), versioned=versioned, read_only=True)
    tensor = content(found).tensor
    assert (tensor.data, tensor.device, tensor.number, tensor.offset) == (0x5000, 2, 7, 0)
    assert (tensor.code, tensor.bits, tensor.lanes) == (2, 16, 1)
    assert (tensor.shape[:4], tensor.strides[: tensor.dimensions]) == ([4, 1, 0, 3], [3, 3, 3, 1])


def test_a_scalar_has_no_dimensions() -> None:
    found = capsule(None, 0x5000, "int64", (), (2, 0), versioned=False, read_only=False)
    assert content(found).tensor.dimensions == 0


@pytest.mark.parametrize("read_only", [False, True])
def test_one_with_a_version_tells_whether_it_may_be_written_to(read_only: bool) -> None:
    found = capsule(None, 0x5000, "int8", (1,), (2, 0), versioned=True, read_only=read_only)
    told = content(found)
    assert (told.major, told.minor, told.flags) == (1, 1, int(read_only))


def test_every_type_has_its_code() -> None:
    codes = {name: code for code, names in CODES for name in names.split()}
    assert codes.keys() == DTYPE_BITS.keys()
    for dtype, code in codes.items():
        found = capsule(None, 0x5000, dtype, (2,), (2, 0), versioned=True, read_only=True)
        assert (content(found).tensor.code, content(found).tensor.bits) == (code, DTYPE_BITS[dtype])


@BOTH
@pytest.mark.parametrize("how", ["not taken", "taken", "copied"])
def test_the_owner_stays_for_as_long_as_the_capsule_or_its_taker(versioned: bool, how: str) -> None:
    owner = Owner()
    gone, found = weakref.ref(owner), made(owner, versioned=versioned)
    taken = None if how == "not taken" else take(found)
    del owner
    gc.collect()
    assert gone() is not None
    if taken is None:
        del found
    else:
        held = type(taken).from_buffer_copy(taken) if how == "copied" else taken
        del found
        gc.collect()
        assert gone() is not None
        held.deleter(ctypes.addressof(held))
    assert gone() is None


def test_an_exception_under_way_is_not_lost() -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    owners = [owner]
    del owner
    with pytest.raises(TypeError, match="must be real number"):
        math.sqrt(made(owners.pop()))  # type: ignore[arg-type]
    assert gone() is None


def test_any_thread_may_give_it_back() -> None:
    owner = Owner()
    gone, taken = weakref.ref(owner), take(made(owner))
    del owner
    # Of a library that knows nothing of Python.
    libc, thread, function = ctypes.CDLL(None), ctypes.c_ulong(), ctypes.cast(taken.deleter, ctypes.c_void_p)
    assert libc.pthread_create(ctypes.byref(thread), None, function, ctypes.c_void_p(ctypes.addressof(taken))) == 0
    assert libc.pthread_join(thread, None) == 0
    assert gone() is None


def test_it_may_be_given_back_when_the_interpreter_has_ended() -> None:
    code = """
import ctypes
from tests.gpu.capsules import Owner, api, made, take
kept = made(Owner())
api.Py_IncRef(ctypes.py_object(kept))  # as a library does that never lets go
for versioned in (False, True):
    taken = take(made(Owner(), versioned=versioned))
    function = ctypes.cast(taken.deleter, ctypes.c_void_p)
    ctypes.CDLL(None).__cxa_atexit(function, ctypes.c_void_p(ctypes.addressof(taken)), None)
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
