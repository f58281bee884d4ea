"""MXNet: parameters that are loaded from a mount are arrays over the mapped file, without a copy.

`install` replaces ``mx.nd.load`` and what Gluon and Modules do with what it gives. Off a mount, and for files or
contexts that this cannot serve, MXNet's own code runs. Written for MXNet 1.9, whose functions it wraps.
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
from trimsfs.client.mapping import mapped
from trimsfs.client.mxnet.arrays import WITH_GRADIENT, fits, over, read, zeros
from trimsfs.client.mxnet.folding import folder
from trimsfs.client.mxnet.mapped_files import register
from trimsfs.client.native import library
from trimsfs.formats import FormatError, TensorTable

log = logging.getLogger(__name__)


class _Lent(threading.local):
    """Arrays that the load under way in this thread has made, and that nobody else has: by ``id``."""

    arrays: dict[int, Any] | None = None
    taken = False
    """Whether the parameter that is being initialised has got one of them."""


_lent = _Lent()


def installed() -> bool:
    """Whether this process's MXNet has been wrapped already."""
    return getattr(mxnet.nd.load, "__trimsfs__", False)


def install() -> None:
    """Wrap what loads parameters. Raises OSError without the library of what is in C."""
    library()
    load = _loading(mxnet.ndarray.utils.load)
    mxnet.ndarray.load = mxnet.ndarray.utils.load = load
    Block.load_parameters = _lending(Block.load_parameters)
    ParameterDict.load = _lending(ParameterDict.load)
    Parameter._init_impl = _taking(Parameter._init_impl)
    Parameter._init_grad = _postponing(Parameter._init_grad)
    folder.install()


def _loading(original: Callable[[str], Any]) -> Callable[[str], Any]:
    @functools.wraps(original)
    def load(fname: str) -> Any:
        legacy = not is_np_array() and not is_np_shape()  # what files with other shapes give is MXNet's to say
        if not legacy:
            log.debug("%s: left to MXNet: NumPy's semantics are set", fname)
        found = _mapped(fname) if legacy and isinstance(fname, str) else None
        return original(fname) if found is None else found

    load.__trimsfs__ = True  # type: ignore[attr-defined]
    return load


def _mapped(fname: str) -> "list[Any] | dict[str, Any] | None":
    """What MXNet would have loaded, over the mapped file; None when it has to load it itself."""
    try:
        with open(fname, "rb", buffering=0) as file:
            common = ensure_local(file)
            if common is None:
                log.debug("%s: left to MXNet: it is on no mount", fname)
                return None
            path = Path(fname).absolute()
            status, mapping = os.fstat(file.fileno()), mapped(path, file, common=common)
        found = read(mapping, path.name) if isinstance(mapping, mmap.mmap) else None
    except (OSError, FormatError, MXNetError) as error:
        log.debug("%s: left to MXNet: %s", fname, error)
        return None
    if found is None or isinstance(mapping, bytes):
        log.debug("%s: left to MXNet: its format or its types", fname)
        return None
    made, names, records = found
    log.debug("%s: %d arrays are mapped", fname, len(made))
    folder.watch(register(path, status, mapping), mapping, records, made)
    if _lent.arrays is not None:
        _lent.arrays |= {id(array): array for array in made}
    return made if names is None else dict(zip(names, made, strict=True))


def arrays(table: TensorTable, mapping: mmap.mmap | bytes) -> dict[str, Any]:
    """All tensors of a mapped file as arrays by name. Raises TypeError for a tensor that MXNet has no array for."""
    tensors = table.tensors
    for tensor in tensors:
        if not fits(tensor):
            kind = f"tensor {tensor.name!r} of {tensor.dtype} and shape {tensor.shape} at {tensor.offset}"
            raise TypeError(f"{kind}: MXNet has no such array; use raw()")
    made, _ = ([], None) if isinstance(mapping, bytes) else over(mapping, tensors)
    folder.start()
    return dict(zip((tensor.name for tensor in tensors), made, strict=True))


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
