"""Libraries for GPUs take tensors that are in emulated devices: as they are, and for as long as they use them.

What they would compute is not shown: nothing is computed there.
"""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.mount import BLOCKS, GpuMount
from tests.support.frameworks import ROOT, python_of
from tests.support.model_files import ARRAYS

KINDS = pytest.mark.parametrize("memory", ["vmm", "ipc"])
TAKE = """
model = trimsfs.open(path).to("cuda", memory=MEMORY)
arrays = getattr(model, LIBRARY)()
for name, array in arrays.items():
    address = array.data.ptr if LIBRARY == "cupy" else array.device_ctypes_pointer.value
    tell([name, str(array.dtype), list(array.shape), address == model.tensors[name].address])
del model
gc.collect()
tell(leases())
del arrays, array
gc.collect()
tell(leases())
"""


def taken(gpu_mount: GpuMount, library: str, memory: str, python: str) -> list[Any]:
    """What a library makes of tensors, and the leases that are held with and without that."""
    return gpu_mount.run(f"MEMORY, LIBRARY = {memory!r}, {library!r}{TAKE}", python=python)


def expected() -> list[Any]:
    arrays = [[name, array.dtype, list(array.shape), True] for name, array in ARRAYS.items()]
    return [*arrays, ["a/b%c", "float16", [1, 2], True], 1, 0]


@KINDS
def test_numba(gpu_mount: GpuMount, memory: str) -> None:
    assert taken(gpu_mount, "numba", memory, python_of("others")) == expected()


def test_numba_copies_from_it_what_the_file_has(gpu_mount: GpuMount) -> None:
    code = (
        "tell([array.copy_to_host().tobytes().hex() for array in trimsfs.open(path).to(0, 'net.*').numba().values()])"
    )
    assert gpu_mount.run(code, python=python_of("others")) == [
        [array.data.hex() for name, array in ARRAYS.items() if name.startswith("net.")]
    ]


@pytest.mark.slow
@KINDS
def test_cupy(gpu_mount: GpuMount, memory: str) -> None:
    python = Path(os.environ.get("TEST_HEAVY", ROOT / ".venv-heavy")) / "bin/python"
    assert taken(gpu_mount, "cupy", memory, str(python)) == expected()


@KINDS
def test_the_views_of_cuda_core(gpu_mount: GpuMount, memory: str) -> None:
    code = f"""
from cuda.core.utils import StridedMemoryView
model = trimsfs.open(path).to("cuda:1", memory={memory!r})
tensor = model.tensors["net.weight"]
for take in (StridedMemoryView.from_dlpack, StridedMemoryView.from_cuda_array_interface):
    view = take(tensor, stream_ptr=-1)
    tell([view.ptr == tensor.address, list(view.shape), str(view.dtype), view.readonly, view.device_id])
    del view
view = StridedMemoryView.from_dlpack(model.tensors["half"], stream_ptr=-1)
del model, tensor
gc.collect()
tell(leases())
del view
gc.collect()
tell(leases())
"""
    view = [True, [2, 3], "float32", memory == "vmm", 1]
    assert gpu_mount.run(code) == [view, view, 1, 0]


def test_types_that_numpy_lacks_can_be_had_as_bytes(gpu_mount: GpuMount) -> None:
    code = """
for tensor in trimsfs.open(path).to("cuda").tensors.values():
    interface = getattr(tensor, "__cuda_array_interface__", None)
    raw = tensor.raw()
    told = raw.__cuda_array_interface__
    assert told["data"] == (tensor.address if tensor.nbytes else 0, True)
    tell([interface and interface["typestr"], told["typestr"], told["shape"], raw.numpy().tobytes().hex()])
    try:
        tell(tensor.numpy().tolist())
    except TypeError as error:
        tell(str(error))
"""
    brain, floats, small, shared, empty, nothing = gpu_mount.run(code, "others.safetensors", python=python_of("others"))
    assert brain == [None, "|u1", [4], "803f0040"]
    assert floats == [1, 2]
    assert small == [None, "|u1", [2], "1234"]
    assert "elements share bytes; use raw()" in shared
    assert (empty, nothing) == (["<f4", "|u1", [0], ""], [])
    assert gpu_mount.run(code, "quantised.gguf") == [["|u1", "|u1", [18], BLOCKS.hex()], list(BLOCKS)]


def test_what_would_be_a_copy_is_refused(gpu_mount: GpuMount) -> None:
    code = """
tensor = trimsfs.open(path).to("cuda:1").tensors["half"]
for wish in ({"copy": True}, {"dl_device": (1, 0)}, {"dl_device": (2, 0)}):
    try:
        tensor.__dlpack__(**wish)
    except BufferError as error:
        tell("numpy() copies it to the host" in str(error))
for wish in ({"copy": False}, {"dl_device": (2, 1)}, {"stream": 1}, {"max_version": (1, 3)}, {"max_version": (0, 8)}):
    tell("versioned" in str(tensor.__dlpack__(**wish)))
"""
    assert gpu_mount.run(code) == [True] * 3 + [False, False, False, True, False]
