"""DLPack capsules for frameworks, of versions 0 and 1.1.

By https://github.com/dmlc/dlpack, ``include/dlpack/dlpack.h``.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

from trimsfs.client.native import library
from trimsfs.formats import DTYPE_BITS

CUDA = 2
"""DLPack's code for CUDA devices."""
_INT, _UINT, _FLOAT, _BFLOAT, _COMPLEX, _BOOL = 0, 1, 2, 4, 5, 6
_CODES = {
    "bool": _BOOL,
    **dict.fromkeys(("int4", "int8", "int16", "int32", "int64"), _INT),
    **dict.fromkeys(("uint4", "uint8", "uint16", "uint32", "uint64"), _UINT),
    **dict.fromkeys(("float16", "float32", "float64"), _FLOAT),
    "bfloat16": _BFLOAT,
    **dict.fromkeys(("complex64", "complex128"), _COMPLEX),
    "float8_e4m3fn": 10,
    "float8_e4m3fnuz": 11,
    "float8_e5m2": 12,
    "float8_e5m2fnuz": 13,
    "float8_e8m0fnu": 14,
    "float6_e2m3fn": 15,
    "float6_e3m2fn": 16,
    "float4_e2m1fn": 17,
}


def capsule(
    owner: object,
    address: int,
    dtype: str,
    shape: tuple[int, ...],
    device: tuple[int, int],
    *,
    versioned: bool,
    read_only: bool,
) -> object:
    """A capsule of a dense tensor at an address of a *device*, given by its type and number.

    *dtype* is a key of DTYPE_BITS. The capsule keeps a reference to *owner* until its consumer frees the tensor, or
    until the capsule is freed unconsumed. Only a *versioned* capsule carries *read_only*.
    """
    made: object = _function()(
        owner,
        address,
        (ctypes.c_int32 * 2)(*device),
        (ctypes.c_uint16 * 3)(_CODES[dtype], DTYPE_BITS[dtype], 1),
        (ctypes.c_int64 * len(shape))(*shape),
        len(shape),
        versioned,
        read_only,
    )
    return made


@cache
def _function() -> Callable[..., Any]:
    """The native function that makes capsules. Raises OSError without the native library."""
    loaded = library()
    function = ctypes.PyDLL(loaded._name, handle=loaded._handle).trimsfs_capsule  # PyDLL: called with the GIL
    function.restype = ctypes.py_object
    pointer = ctypes.c_void_p
    function.argtypes = (ctypes.py_object, *[pointer] * 4, ctypes.c_int32, ctypes.c_int, ctypes.c_int)
    return function
