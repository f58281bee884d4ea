"""Libraries of others, given device memory by `__cuda_array_interface__`: run as ``python consume.py LIBRARY``.

Prints what they make of it: shape, and the bytes that they copy back, in hexadecimal.
"""

import array
import json
import sys
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver

CONTENT = array.array("f", range(6)).tobytes()


class Lent:
    """Two rows of three numbers on a device, to be read only."""

    def __init__(self) -> None:
        call("cuInit", 0)
        call("cuCtxSetCurrent", call("cuDevicePrimaryCtxRetain", 0))
        self.pointer = int(call("cuMemAlloc", len(CONTENT)))
        call("cuMemcpyHtoD", self.pointer, CONTENT, len(CONTENT))

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"shape": (2, 3), "typestr": "<f4", "data": (self.pointer, True), "strides": None, "version": 3}


def call(name: str, *arguments: Any) -> Any:
    """What a function of the driver returns beside success."""
    result, *values = getattr(driver, name)(*arguments)
    assert result == driver.CUresult.CUDA_SUCCESS, (name, result)
    return values[0] if values else None


def cuda_core(lent: Lent) -> tuple[list[int], bytes]:
    """As a view, on a stream of its own, with the library's own idea of devices."""
    from cuda.core import Device
    from cuda.core.utils import StridedMemoryView

    device = Device(0)
    device.set_current()
    stream = device.create_stream()
    view = StridedMemoryView.from_any_interface(lent, stream_ptr=int(stream.handle))
    assert (view.is_device_accessible, view.readonly, view.device_id) == (True, True, 0)
    content = bytearray(len(CONTENT))
    call("cuMemcpyDtoHAsync", content, view.ptr, len(content), int(stream.handle))
    stream.sync()
    return list(view.shape), bytes(content)


def numba(lent: Lent) -> tuple[list[int], bytes]:
    """As an array, and by way of a copy that it makes on the device."""
    from numba import cuda

    here = cuda.as_cuda_array(lent).copy_to_host()
    there = cuda.to_device(here).copy_to_host()
    assert (here == there).all()
    return list(here.shape), here.tobytes()


LIBRARIES: dict[str, Callable[[Lent], tuple[list[int], bytes]]] = {"cuda.core": cuda_core, "numba": numba}

if __name__ == "__main__":
    shape, content = LIBRARIES[sys.argv[1]](Lent())
    print(json.dumps({"shape": shape, "content": content.hex()}))
