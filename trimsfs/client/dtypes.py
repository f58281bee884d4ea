"""Element types by their names in NumPy and ml_dtypes, which frameworks use too."""

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
    """The element type of a library, by its attribute *dtype*; errors name the tensor *name*. Raises TypeError."""
    try:
        return getattr(importlib.import_module(library), dtype)
    except ImportError:
        raise TypeError(f"tensor {name!r} of {dtype} needs {library}: pip install {library}") from None
    except AttributeError:
        raise TypeError(f"tensor {name!r}: {library} has no type {dtype}; use raw()") from None


def numpy_dtype(name: str, dtype: str) -> "np.dtype[Any]":
    """The element type of NumPy or ml_dtypes; errors name the tensor *name*. Raises TypeError."""
    import numpy as np  # noqa: PLC0415 - the client itself needs no library

    return np.dtype(dtype if dtype in NUMPY else attribute(name, dtype, "ml_dtypes"))


def check_whole_bytes(name: str, dtype: str) -> None:
    """Raises TypeError for a type whose elements share bytes, such as int4."""
    if DTYPE_BITS[dtype] % 8:
        raise TypeError(f"tensor {name!r} of {dtype}: elements share bytes; use raw()")
