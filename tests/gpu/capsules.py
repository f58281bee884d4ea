"""Capsules of DLPack as their takers see them, by DLPack's own description."""

import ctypes
from typing import Any

from trimsfs.extras.gpu.client.dlpack import capsule

api = ctypes.pythonapi
api.PyCapsule_GetName.restype = ctypes.c_char_p
api.PyCapsule_GetName.argtypes = (ctypes.py_object,)
api.PyCapsule_GetPointer.restype = ctypes.c_void_p
api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
api.PyCapsule_SetName.argtypes = (ctypes.py_object, ctypes.c_char_p)

USED = {b"dltensor": b"used_dltensor", b"dltensor_versioned": b"used_dltensor_versioned"}


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("device", "number", "dimensions")),
        *((name, ctypes.c_uint8) for name in ("code", "bits")),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    )


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("major", "minor")),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


class Owner:
    """What a capsule keeps."""


def content(made: object) -> Any:
    """What a capsule that nobody has taken has in it: a Managed or a Versioned."""
    name = api.PyCapsule_GetName(made)
    kind = Managed if name == b"dltensor" else Versioned
    assert name in USED
    return kind.from_address(api.PyCapsule_GetPointer(made, name))


def take(made: object) -> Any:
    """Take what a capsule has, which is to be given back by its ``deleter``."""
    found = content(made)
    api.PyCapsule_SetName(made, USED[api.PyCapsule_GetName(made)])
    return found


def made(owner: object, *, versioned: bool = False) -> object:
    return capsule(owner, 0x5000, "float32", (2, 3), (2, 1), versioned=versioned, read_only=True)
