"""Looks up element types in libraries, by the names that NumPy, ml_dtypes and frameworks share."""

import importlib
from typing import TYPE_CHECKING, Any

from trimsfs.formats import DTYPE_BITS

if TYPE_CHECKING:
    import numpy as np

NUMPY = frozenset(
    {
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    }
)


def attribute(name: str, dtype: str, library: str) -> Any:
    """A library's element type, its attribute *dtype*. Raises TypeError, which names the tensor *name*."""
    try:
        return getattr(importlib.import_module(library), dtype)
    except ImportError:
        raise TypeError(f"tensor {name!r} of {dtype} needs {library}: pip install {library}") from None
    except AttributeError:
        raise TypeError(f"tensor {name!r}: {library} has no type {dtype}; use raw()") from None


def numpy_dtype(name: str, dtype: str) -> "np.dtype[Any]":
    """The element type in NumPy or ml_dtypes. Raises TypeError, which names the tensor *name*."""
    import numpy as np  # noqa: PLC0415 - the client itself needs no library

    return np.dtype(dtype if dtype in NUMPY else attribute(name, dtype, "ml_dtypes"))


def check_whole_bytes(name: str, dtype: str) -> None:
    """Check that each element has bytes of its own. Raises TypeError for types such as int4."""
    if DTYPE_BITS[dtype] % 8:
        raise TypeError(f"tensor {name!r} of {dtype}: elements share bytes; use raw()")
