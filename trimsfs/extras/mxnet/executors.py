"""Wraps MXNet's executors for inference, and so its Modules: they map parameters from a mount instead of copying them.

MXNet copies parameters into arrays that the executor owns. The wrapper places these arrays in reserved, untouched
memory, laid out as in a loaded file. Where a parameter still equals the file, it maps the file privately instead of
copying, so that a write to one array changes no other. MXNet does everything else.
"""

import contextlib
import ctypes
import functools
import io
import logging
import mmap
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import mxnet
import numpy as np
from mxnet.base import _LIB, check_call
from mxnet.executor import Executor
from mxnet.module import module as mxnet_module
from mxnet.ndarray import NDArray
from mxnet.util import is_np_array, is_np_shape

from trimsfs.client import pages
from trimsfs.client.pages import PAGE
from trimsfs.extras.mxnet import mapped_files
from trimsfs.extras.mxnet.arrays import WITH_GRADIENT, Records, over, zeros
from trimsfs.extras.mxnet.folding_thread import folder
from trimsfs.extras.mxnet.mapped_files import MappedFile
from trimsfs.formats import Tensor

log = logging.getLogger(__name__)

LEAST = 16 * PAGE
"""Bytes of the smallest array worth mapping: one or two pages at its ends are copied in any case."""

_get_data = _LIB["MXNDArrayGetData"]
"""A separate function object: a call through MXNet's own attribute ends folding, because the program may then write."""
_reserved: "weakref.WeakKeyDictionary[Any, tuple[mmap.mmap, Records, list[Any]]]" = weakref.WeakKeyDictionary()
"""The reserved memory and its arrays, for each executor, until something is mapped there."""


def install() -> None:
    """Wrap the functions that allocate and copy an executor's parameters."""
    mxnet.symbol.Symbol.simple_bind = _wrap_simple_bind(mxnet.symbol.Symbol.simple_bind)
    Executor.copy_params_from = _wrap_copy_params_from(Executor.copy_params_from)
    mxnet_module.Module.init_params = _wrap_init_params(mxnet_module.Module.init_params)
    mxnet_module.zeros = _wrap_zeros(mxnet_module.zeros)


def _wrap_simple_bind(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Symbol.simple_bind``, which uses the arrays in ``shared_buffer`` that have its parameters' names."""

    @functools.wraps(original)
    def simple_bind(self: Any, ctx: Any, grad_req: Any = "write", *others: Any, **named: Any) -> Any:
        executor = None
        if not others and ctx == mxnet.cpu() and _null(grad_req) and not is_np_array() and not is_np_shape():
            try:
                executor = _bind_reserved(functools.partial(original, self, ctx, grad_req), self, named)
            except Exception as error:  # MXNet itself reports what is wrong
                log.debug("the executor copies its parameters: %s", error)
        return original(self, ctx, grad_req, *others, **named) if executor is None else executor

    return simple_bind


def _null(grad_req: Any) -> bool:
    """Whether no argument gets a gradient."""
    requests = list(grad_req.values()) if isinstance(grad_req, dict) else grad_req
    return requests == "null" or (isinstance(requests, list) and 0 < requests.count("null") == len(requests))


def _bind_reserved(bind: Callable[..., Any], symbol: Any, named: dict[str, Any]) -> Any:
    """An executor with reserved parameters; None where no file fits it, or it shares parameters with another."""
    buffer, names = named.get("shared_buffer"), named.get("shared_arg_names")
    usual = isinstance(buffer, dict | None) and isinstance(names, list | None)
    if not usual or named.get("shared_exec") is not None or named.get("group2ctx"):
        return None
    tensors, size = _layout(symbol, named.get("type_dict") or {}, named)
    if not tensors or tensors.keys() & (buffer or {}):
        return None
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_NOHUGEPAGE)  # few pages are written, far apart
    made, records = over(mapping, list(tensors.values()))
    arrays = dict(zip(tensors, made, strict=True))
    lent = (buffer or {}) | arrays
    others = [name for name in names or [] if name not in arrays]
    executor = bind(**named | {"shared_buffer": lent, "shared_arg_names": others})
    if buffer is not None:
        buffer.update((name, array) for name, array in lent.items() if name not in (names or []))
    _reserved[executor] = mapping, records, [executor.arg_dict[name] for name in tensors]
    return executor


def _layout(symbol: Any, types: Mapping[str, Any], shapes: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """The parameters as laid out in the file that holds most of their bytes, and the file's size."""
    names = symbol.list_arguments()
    if not mapped_files.files or len(set(names)) < len(names):
        return {}, 0
    known = {name: shape for name, shape in shapes.items() if name in names and isinstance(shape, tuple)}
    all_shapes, _, _ = symbol.infer_shape_partial(**known)
    all_types, _, _ = symbol.infer_type_partial(**{name: types[name] for name in types if name in names})
    kinds = [(np.dtype(dtype or np.float32).name, shape) for dtype, shape in zip(all_types, all_shapes, strict=True)]
    expected = dict(zip(names, kinds, strict=True))
    best: dict[str, Tensor] = {}
    size = most = 0
    for mapped_file in list(mapped_files.files):
        by_name = {tensor.name.removeprefix("arg:"): tensor for tensor in mapped_file.tensors if tensor.nbytes >= LEAST}
        fitting = {name: of for name, of in by_name.items() if expected.get(name) == (of.dtype, of.shape)}
        nbytes = sum(tensor.nbytes for tensor in fitting.values())
        if nbytes > most:
            best, size, most = fitting, mapped_file.status.st_size, nbytes
    return best, size


class _Match(NamedTuple):
    """An open file, and those of its tensors that arrays still equal, by the arrays' names."""

    mapped_file: MappedFile
    file: io.FileIO
    tensors: dict[str, Tensor]


def _best_match(arrays: Mapping[str, Any]) -> _Match | None:
    """The file that most of the arrays lie over, with those that still equal it; None when there is no such file."""
    matches: dict[MappedFile, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        if type(array) is not NDArray or array.context != mxnet.cpu():
            continue
        dtype = np.dtype(array.dtype)
        nbytes = array.size * dtype.itemsize
        address = _address(array) if nbytes >= LEAST else 0
        for mapped_file in list(mapped_files.files):
            here = mapped_file.start <= address < mapped_file.start + mapped_file.status.st_size
            if here and mapped_file.mapping() is not None:  # else the addresses may now belong to another mapping
                tensor = Tensor(name, dtype.name, array.shape, address - mapped_file.start, nbytes)
                matches.setdefault(mapped_file, {})[name] = tensor
    if matches:
        most = max(matches, key=lambda mapped_file: len(matches[mapped_file]))
        with contextlib.suppress(OSError):
            return _Match(mapped_file=most, tensors=most.unwritten(matches[most]), file=most.open())
    return None


class _CopiedParameters(dict[str, Any]):
    """Parameters to copy: ``items`` skips each one that *mapped_instead* maps, when its turn comes."""

    def __init__(self, arrays: dict[str, Any], mapped_instead: Callable[[str, Any], bool]) -> None:
        super().__init__(arrays)
        self._mapped_instead = mapped_instead
        self.mapped = 0

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        for name, array in super().items():
            if self._mapped_instead(name, array):
                self.mapped += 1
            else:
                yield name, array


def _wrap_copy_params_from(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Executor.copy_params_from``, which iterates over the items of its argument."""

    @functools.wraps(original)
    def copy_params_from(self: Any, arg_params: Any, *others: Any, **named: Any) -> Any:
        reserved = _reserved.get(self)
        match = _best_match(arg_params) if reserved is not None and type(arg_params) is dict else None
        if reserved is None or match is None or _reserved.pop(self, None) is None:
            return original(self, arg_params, *others, **named)
        copied = _CopiedParameters(arg_params, functools.partial(_map, reserved[0], self, match))
        try:
            with match.file:
                return original(self, copied, *others, **named)
        finally:
            if copied.mapped:  # folding may remap the memory from now on, so this must not map there again
                folder.watch(match.mapped_file, *reserved)
            else:
                _reserved[self] = reserved

    return copy_params_from


def _map(reserved: mmap.mmap, executor: Any, match: _Match, name: str, array: Any) -> bool:
    """Map the file over an executor's reserved array, instead of copying a given array; returns whether it did."""
    tensor, target = match.tensors.get(name), executor.arg_dict.get(name)
    if tensor is None or target is None or len(reserved) != match.mapped_file.status.st_size:
        return False
    here, there = pages.address_of(reserved), match.mapped_file.start
    begin, end = here + tensor.offset, here + tensor.offset + tensor.nbytes
    if (target.dtype, target.shape) != (array.dtype, array.shape) or _address(target) != begin:
        return False
    # Counts as a write, so that operators drop their caches of the array.
    check_call(_LIB.MXNDArrayWaitToWrite(target.handle))
    first, last = pages.rounded(begin), end // PAGE * PAGE
    with contextlib.suppress(OSError):
        pages.map_over(first, last - first, match.file.fileno(), first - here)
        for part, after in ((begin, first), (last, end)):
            ctypes.memmove(part, part - here + there, after - part)
        return True
    return False


def _address(array: Any) -> int:
    """The address of an array in the default layout, once all pending writes to it are done."""
    address = ctypes.c_void_p()
    check_call(_get_data(array.handle, ctypes.byref(address)))
    return address.value or 0


def _wrap_init_params(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Module.init_params``, which copies parameters into the Module's arrays, unless they are these arrays."""

    @functools.wraps(original)
    def init_params(self: Any, *arguments: Any, **named: Any) -> Any:
        given = named.get("arg_params")
        first = self.binded and not self.params_initialized and not self.for_training
        if first and type(given) is dict:
            remapped = _map_again(given, self._arg_params)
            self._arg_params |= remapped  # nobody has the Module's arrays yet
            named["arg_params"] = given | remapped
        return original(self, *arguments, **named)

    return init_params


def _map_again(given: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays to replace the present ones: the given parameters, in another mapping of their file."""
    if not all(type(given.get(name)) is NDArray and given[name].shape == present[name].shape for name in present):
        return {}  # MXNet may raise, and must do so at the same point as without trimsfs
    alike = [name for name, of in present.items() if (of.dtype, of.context) == (given[name].dtype, given[name].context)]
    match = _best_match({name: given[name] for name in alike})
    if match is None:
        return {}
    with match.file as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped_files.register(match.mapped_file.path, match.mapped_file.status, mapping)
    made, _ = over(mapping, list(match.tensors.values()))
    return dict(zip(match.tensors, made, strict=True))


def _wrap_zeros(original: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``zeros``, with which a Module makes arrays to overwrite: their memory stays untouched until then."""

    @functools.wraps(original)
    def postponed(shape: Any, ctx: Any = None, dtype: Any = None, stype: Any = None, **named: Any) -> Any:
        plain = ctx is None and stype in {None, "default"} and mxnet.current_context() == mxnet.cpu() and not named
        if plain and mapped_files.files and dtype in WITH_GRADIENT and np.prod(shape) >= LEAST:
            return zeros(WITH_GRADIENT[dtype], shape)
        return original(shape, ctx, dtype, stype, **named)

    return postponed
