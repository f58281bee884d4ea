"""Wraps MXNet's loaders: parameters that a program loads from a mount are arrays over the mapped file.

`install` replaces ``mx.nd.load``, and Gluon's functions that take its result. MXNet's own code loads files off a mount,
and files and contexts that a mapping cannot serve. Written for MXNet 1.9.
"""

import functools
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mxnet
from mxnet import autograd
from mxnet.base import MXNetError
from mxnet.gluon.block import Block
from mxnet.gluon.parameter import Parameter, ParameterDict
from mxnet.util import is_np_array, is_np_shape

from trimsfs.client.file_state import ensure_local
from trimsfs.client.model_mapping import mapped
from trimsfs.client.native import library
from trimsfs.extras.mxnet.arrays import WITH_GRADIENT, fits, over, read, zeros
from trimsfs.extras.mxnet.folding_thread import folder
from trimsfs.extras.mxnet.mapped_files import register
from trimsfs.formats import FormatError, TensorTable

log = logging.getLogger(__name__)


class _Fresh(threading.local):
    """The arrays, by ``id``, of this thread's running load, which the program cannot hold yet."""

    arrays: dict[int, Any] | None = None
    taken = False
    """Whether the parameter being initialised takes one of them."""


_fresh = _Fresh()


def installed() -> bool:
    """Whether this process's MXNet has been wrapped already."""
    return getattr(mxnet.nd.load, "__trimsfs__", False)


def install() -> None:
    """Wrap MXNet's loaders. Raises OSError without the native library."""
    library()
    load = _wrap_load(mxnet.ndarray.utils.load)
    mxnet.ndarray.load = mxnet.ndarray.utils.load = load
    Block.load_parameters = _wrap_load_parameters(Block.load_parameters)
    ParameterDict.load = _wrap_load_parameters(ParameterDict.load)
    Parameter._init_impl = _wrap_init_impl(Parameter._init_impl)
    Parameter._init_grad = _wrap_init_grad(Parameter._init_grad)
    folder.install()


def _wrap_load(original: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(original)
    def load(fname: str) -> Any:
        legacy = not is_np_array() and not is_np_shape()  # NumPy semantics change the arrays that MXNet makes
        if not legacy:
            log.debug("%s: not mapped: MXNet runs with NumPy semantics", fname)
        loaded = _load_mapped(fname) if legacy and isinstance(fname, str) else None
        return original(fname) if loaded is None else loaded

    load.__trimsfs__ = True  # type: ignore[attr-defined]
    return load


def _load_mapped(fname: str) -> "list[Any] | dict[str, Any] | None":
    """What MXNet would load, as arrays over the mapped file; None when MXNet must load it itself."""
    try:
        with open(fname, "rb", buffering=0) as file:
            common = ensure_local(file)
            if common is None:
                log.debug("%s: not mapped: it is on no mount", fname)
                return None
            path = Path(fname).absolute()
            status, mapping = os.fstat(file.fileno()), mapped(path, file, common=common)
        parsed = read(mapping, path.name) if isinstance(mapping, mmap.mmap) else None
    except (OSError, FormatError, MXNetError) as error:
        log.debug("%s: not mapped: %s", fname, error)
        return None
    if parsed is None or isinstance(mapping, bytes):
        log.debug("%s: not mapped: unsupported format or types", fname)
        return None
    made, names, records = parsed
    log.debug("%s: mapped %d arrays", fname, len(made))
    folder.watch(register(path, status, mapping), mapping, records, made)
    if _fresh.arrays is not None:
        _fresh.arrays |= {id(array): array for array in made}
    return made if names is None else dict(zip(names, made, strict=True))


def arrays(table: TensorTable, mapping: mmap.mmap | bytes) -> dict[str, Any]:
    """All tensors of a mapped file as arrays by name. Raises TypeError for a tensor that no MXNet array can hold."""
    tensors = table.tensors
    for tensor in tensors:
        if not fits(tensor):
            kind = f"tensor {tensor.name!r} of {tensor.dtype} and shape {tensor.shape} at {tensor.offset}"
            raise TypeError(f"{kind}: MXNet has no such array; use raw()")
    made, _ = ([], None) if isinstance(mapping, bytes) else over(mapping, tensors)
    folder.start()
    return dict(zip((tensor.name for tensor in tensors), made, strict=True))


def _wrap_load_parameters(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that loads arrays only to set parameters, so that the parameters may keep the arrays."""

    @functools.wraps(original)
    def load(*arguments: Any, **named: Any) -> Any:
        with _tracking():
            return original(*arguments, **named)

    return load


@contextmanager
def _tracking() -> Iterator[None]:
    outer = _fresh.arrays
    _fresh.arrays = {} if outer is None else outer
    try:
        yield
    finally:
        _fresh.arrays = outer


class _Uncopied:
    """Wraps an array: ``copyto`` returns the array itself."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def copyto(self, _context: Any) -> Any:
        return self._array


def _wrap_init_impl(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Parameter._init_impl``, which copies the data to each context, to use a fresh array itself in its own."""

    @functools.wraps(original)
    def init_impl(self: Any, data: Any, ctx_list: Any) -> Any:
        arrays, contexts = _fresh.arrays, list(ctx_list)
        if arrays is None or contexts != [data.ctx] or arrays.pop(id(data), None) is None:
            return original(self, data, contexts)
        _fresh.taken = True
        try:
            return original(self, _Uncopied(data), contexts)
        finally:
            _fresh.taken = False

    return init_impl


def _wrap_init_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Parameter._init_grad``, which writes zeros for each gradient: untouched pages are zeros already."""

    @functools.wraps(original)
    def init_grad(self: Any) -> Any:
        array = self._data[0]
        dtype = WITH_GRADIENT.get(array.dtype)
        if not _fresh.taken or dtype is None or self._grad_stype != "default" or self.grad_req == "null":
            return original(self)
        self._grad = [zeros(dtype, array.shape)]
        return autograd.mark_variables(self._check_and_get(self._data, list), self._grad, self.grad_req)

    return init_grad
