"""MXNet: parameters that are loaded from a mount are arrays over the mapped file, without a copy.

`install` replaces ``mx.nd.load`` and what Gluon and Modules do with what it gives. Off a mount, and for files or
contexts that this cannot serve, MXNet's own code runs. Written for MXNet 1.9, whose functions it wraps.
"""

import ctypes
import functools
import importlib
import io
import logging
import math
import mmap
import os
import struct
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mxnet
import numpy as np
from mxnet import autograd
from mxnet.base import _LIB, NDArrayHandle, check_call
from mxnet.gluon.block import Block
from mxnet.gluon.parameter import Parameter, ParameterDict
from mxnet.ndarray.ndarray import dl_managed_tensor_deleter
from mxnet.ndarray.sparse import _ndarray_cls
from mxnet.util import is_np_array, is_np_shape

from trimsfs.client import pages
from trimsfs.client.model import Model
from trimsfs.client.mxnet_folding import Folder
from trimsfs.client.places import on_mount
from trimsfs.formats import DTYPE_BITS, FormatError, Tensor
from trimsfs.formats import mxnet as params

log = logging.getLogger(__name__)

_KINDS = {
    "int8": (0, 8),
    "int32": (0, 32),
    "int64": (0, 64),
    "bool": (1, 1),
    "uint8": (1, 8),
    "float16": (2, 16),
    "float32": (2, 32),
    "float64": (2, 64),
}
"""DLPack's type code and bits of the types that MXNet takes over."""
WITH_GRADIENT: dict[type, str] = {np.float16: "float16", np.float32: "float32", np.float64: "float64"}
_MANAGED_TENSOR = struct.Struct("=QiiiBBHQQQQQ")
"""DLManagedTensor: data, device type and number, dimensions, type code, bits, lanes, shape, strides, offset; context,
deleter."""
_CPU, _GPU = 1, 2
_DENSE = 0


class _Lent(threading.local):
    """Arrays that the load under way in this thread has made, and that nobody else has: by ``id``."""

    arrays: dict[int, Any] | None = None
    taken = False
    """Whether the parameter that is being initialised has got one of them."""


class _Part(NamedTuple):
    """A part of memory, and the part of a file that is mapped there."""

    start: int
    end: int
    file: tuple[str, str, int]
    """Its device, its inode, and how far before that the file would begin."""


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A file of a mount, which never changes, and where it is mapped, in parts from other files with the same bytes."""

    path: Path
    status: os.stat_result
    parts: Sequence[_Part]
    tensors: Sequence[Tensor]

    @property
    def start(self) -> int:
        """The address of the mapping."""
        return self.parts[0].start

    def open(self) -> io.FileIO:
        """The same file. Raises OSError, also where the path leads to another by now."""
        file = self.path.open("rb", buffering=0)
        if not os.path.samestat(os.fstat(file.fileno()), self.status):
            file.close()
            raise FileNotFoundError(self.path)
        return file

    def unwritten(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the tensors that are in memory what they are in the file.

        Raises OSError where the kernel cannot tell.
        """
        regions = {name: (self.start + of.offset, self.start + of.offset + of.nbytes) for name, of in tensors.items()}
        whole = {name: (a // pages.PAGE * pages.PAGE, pages.rounded(b)) for name, (a, b) in regions.items()}
        kept = [name for name in tensors if not pages.own(*whole[name])]
        mapped = list(self._unchanged())  # asked later, for folding maps other files where the process's own pages were
        return {name: tensors[name] for name in kept if _covered(whole[name], mapped)}

    def _unchanged(self) -> Iterator[pages.Region]:
        """Where the same is mapped as at first."""
        before = {part.start: part for part in self.parts}
        starts = sorted(before)
        for start, end, file in _parts(starts[0], self.parts[-1].end):
            part = before[starts[bisect_right(starts, start) - 1]]
            if part.file == file:
                yield start, min(end, part.end)


def _parts(start: int, end: int) -> Iterator[_Part]:
    """What is mapped in a part of memory."""
    lines = Path("/proc/self/maps").read_bytes()
    for line in io.BytesIO(lines[max(0, lines.find(b"%08x-" % start)) :]):  # they are many, and in order
        first = int(line[: line.index(b"-")], 16)
        if first >= end:
            return
        if start <= first:
            region, _, offset, device, inode = line.decode().split(maxsplit=5)[:5]
            yield _Part(first, int(region.partition("-")[2], 16), (device, inode, first - int(offset, 16)))


def _covered(region: pages.Region, parts: Sequence[pages.Region]) -> bool:
    """Whether parts, which do not overlap, cover a region."""
    return sum(max(0, min(region[1], end) - max(region[0], start)) for start, end in parts) == region[1] - region[0]


_lent = _Lent()
_folder = Folder()
sources: list[Source] = []
"""What arrays have been made of, as far as it is mapped."""
watch = _folder.watch


def remember(path: Path, status: os.stat_result, mapping: mmap.mmap, tensors: Sequence[Tensor]) -> None:
    """A file of a mount is mapped from now on."""
    start = pages.address_of(mapping)
    source = Source(path, status, list(_parts(start, start + len(mapping))), tensors)
    sources.append(source)
    weakref.finalize(mapping, sources.remove, source).atexit = False


def install() -> None:
    """Have MXNet load without a copy from now on, in this process. A second call does nothing."""
    if getattr(mxnet.nd.load, "__trimsfs__", False):
        return
    load = _loading(mxnet.ndarray.utils.load)
    mxnet.ndarray.load = mxnet.ndarray.utils.load = load
    Block.load_parameters = _lending(Block.load_parameters)
    ParameterDict.load = _lending(ParameterDict.load)
    Parameter._init_impl = _taking(Parameter._init_impl)
    Parameter._init_grad = _postponing(Parameter._init_grad)
    _folder.install()
    importlib.import_module("trimsfs.client.mxnet_module").install()  # which imports this module


def _loading(original: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(original)
    def load(fname: str) -> Any:
        legacy = not is_np_array() and not is_np_shape()  # what files with other shapes give is MXNet's to say
        found = _mapped(fname) if legacy and isinstance(fname, str) else None
        return original(fname) if found is None else found

    load.__trimsfs__ = True  # type: ignore[attr-defined]
    return load


def _mapped(path: str) -> "list[Any] | dict[str, Any] | None":
    """What MXNet would have loaded, over the mapped file; None when it has to load it itself."""
    try:
        with open(path, "rb", buffering=0) as file:
            if not on_mount(file):
                return None
            model, status = Model(path, file), os.fstat(file.fileno())
    except (OSError, FormatError) as error:
        log.debug("%s: left to MXNet: %s", path, error)
        return None
    mapping, tensors = model.mapping, model.table.tensors
    legacy = model.table.format == params.NAME and not _new(model)
    if isinstance(mapping, bytes) or not legacy or not all(_possible(model, tensor) for tensor in tensors):
        log.debug("%s: left to MXNet: %s or its types", path, model.table.format)
        return None
    made = over(mapping, tensors)
    remember(model.path, status, mapping, tensors)
    watch(model.path, model.inode, mapping, tensors, made)
    if _lent.arrays is not None:
        _lent.arrays |= {id(array): array for array in made}
    if not model.table.named or not made:
        return made
    return dict(zip((tensor.name for tensor in tensors), made, strict=True))


def arrays(model: Model) -> dict[str, Any]:
    """All tensors of a model as arrays by name. Raises TypeError for what MXNet has no array of."""
    tensors = model.table.tensors
    for tensor in tensors:
        if not _fits(tensor) or tensor.file is not None:
            kind = f"tensor {tensor.name!r} of {tensor.dtype} and shape {tensor.shape} at {tensor.offset}"
            raise TypeError(f"{model.path}: {kind}: MXNet has no such array; use raw()")
    return dict(zip((tensor.name for tensor in tensors), over(model.mapping, tensors), strict=True))


def _new(model: Model) -> bool:
    """Whether it was saved with NumPy's shapes, so that MXNet refuses to load it without them."""
    return bool(model.table.tensors) and struct.unpack_from("<I", model.mapping, params.FIRST_ARRAY) == (params.V3,)


def _possible(model: Model, tensor: Tensor) -> bool:
    """Whether MXNet would make this array in the memory of the host."""
    if not _fits(tensor):
        return False
    (device,) = struct.unpack_from("<i", model.mapping, tensor.offset - params.BEHIND_DEVICE)
    return bool(device != _GPU or mxnet.context.num_gpus() == 0)


def _fits(tensor: Tensor) -> bool:
    """Whether an array can lie where a tensor's bytes are in the file."""
    known = tensor.dtype in _KINDS and bool(tensor.nbytes) and bool(tensor.shape)
    return known and tensor.offset % (DTYPE_BITS[tensor.dtype] // 8) == 0


def zeros(dtype: str, shape: Sequence[int]) -> Any:
    """An array whose memory nobody has touched, as that is all zeros."""
    tensor = Tensor("", dtype, tuple(shape), 0, math.prod(shape) * DTYPE_BITS[dtype] // 8)
    return over(mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE), [tensor])[0]


def over(mapping: Any, tensors: Sequence[Tensor]) -> list[Any]:
    """Arrays over a mapping, which lives as long as any of them."""
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping)) if tensors else 0
    holder, deleter = ctypes.py_object(mapping), ctypes.cast(dl_managed_tensor_deleter, ctypes.c_void_p).value
    record = ctypes.create_string_buffer(_MANAGED_TENSOR.size)
    take, arrays = _LIB.MXNDArrayFromDLPackEx, []
    for tensor in tensors:
        code, bits = _KINDS[tensor.dtype]
        shape = (ctypes.c_int64 * max(1, len(tensor.shape)))(*tensor.shape)
        fields = (_CPU, 0, len(tensor.shape), code, bits, 1, ctypes.addressof(shape), 0, 0, id(mapping), deleter)
        _MANAGED_TENSOR.pack_into(record, 0, base + tensor.offset, *fields)
        handle = NDArrayHandle()
        ctypes.pythonapi.Py_IncRef(holder)  # the deleter gives it back
        check_call(take(record, True, ctypes.byref(handle)))
        arrays.append(_ndarray_cls(handle, stype=_DENSE))
    return arrays


def _lending(original: Callable[..., Any]) -> Callable[..., Any]:
    """A function that loads arrays only to give them to parameters: these may have them for themselves."""

    @functools.wraps(original)
    def load(*arguments: Any, **named: Any) -> Any:
        with _lending_here():
            return original(*arguments, **named)

    return load


@contextmanager
def _lending_here() -> Iterator[None]:
    outer = _lent.arrays
    _lent.arrays = {} if outer is None else outer
    try:
        yield
    finally:
        _lent.arrays = outer


class _Own:
    """An array as one that gives itself where a copy is asked for."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def copyto(self, _context: Any) -> Any:
        return self._array


def _taking(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Parameter._init_impl``, which copies its data to every context: to the one it is in it need not."""

    @functools.wraps(original)
    def init_impl(self: Any, data: Any, ctx_list: Any) -> Any:
        arrays, contexts = _lent.arrays, list(ctx_list)
        if arrays is None or contexts != [data.ctx] or arrays.pop(id(data), None) is None:
            return original(self, data, contexts)
        _lent.taken = True
        try:
            return original(self, _Own(data), contexts)
        finally:
            _lent.taken = False

    return init_impl


def _postponing(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Parameter._init_grad``, which writes zeros for the gradient of each parameter: pages that nobody has touched
    are zeros."""

    @functools.wraps(original)
    def init_grad(self: Any) -> Any:
        array = self._data[0]
        dtype = WITH_GRADIENT.get(array.dtype)
        if not _lent.taken or dtype is None or self._grad_stype != "default" or self.grad_req == "null":
            return original(self)
        self._grad = [zeros(dtype, array.shape)]
        return autograd.mark_variables(self._check_and_get(self._data, list), self._grad, self.grad_req)

    return init_grad
