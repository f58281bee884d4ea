"""MXNet's executors for inference, and so its Modules: parameters from a mount are mapped where they would be copied.

An executor has arrays of its own, which parameters are copied to. Here these lie in memory that nobody has touched, in
the layout of a file that has been loaded. A parameter that still is what the file has at that place is then not copied:
the file is mapped there, privately, so that writing to one array changes no other. All else is left to MXNet.
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
from trimsfs.client.mxnet import mapped_files
from trimsfs.client.mxnet.arrays import WITH_GRADIENT, Records, over, zeros
from trimsfs.client.mxnet.folding import folder
from trimsfs.client.mxnet.mapped_files import MappedFile
from trimsfs.client.pages import PAGE
from trimsfs.formats import Tensor

log = logging.getLogger(__name__)

LEAST = 16 * PAGE
"""Bytes of an array that is worth mapping: one or two pages of each are copied in any case."""

_get_data = _LIB["MXNDArrayGetData"]
"""A function of its own: folding ends where a program calls the one of this name, as it might write there."""
_rooms: "weakref.WeakKeyDictionary[Any, tuple[mmap.mmap, Records, list[Any]]]" = weakref.WeakKeyDictionary()
"""Of executors: memory where parameters lie as in a file, and these; until something has been mapped there."""


def install() -> None:
    """Wrap what allocates parameters, and what copies them."""
    mxnet.symbol.Symbol.simple_bind = _binding(mxnet.symbol.Symbol.simple_bind)
    Executor.copy_params_from = _copying(Executor.copy_params_from)
    mxnet_module.Module.init_params = _initialising(mxnet_module.Module.init_params)
    mxnet_module.zeros = _postponing(mxnet_module.zeros)


def _binding(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Symbol.simple_bind``, which takes from ``shared_buffer`` the arrays that it finds there by their names."""

    @functools.wraps(original)
    def simple_bind(self: Any, ctx: Any, grad_req: Any = "write", *others: Any, **named: Any) -> Any:
        executor = None
        if not others and ctx == mxnet.cpu() and _null(grad_req) and not is_np_array() and not is_np_shape():
            try:
                executor = _bound(functools.partial(original, self, ctx, grad_req), self, named)
            except Exception as error:  # what is wrong is MXNet's to say
                log.debug("parameters will be copied: %s", error)
        return original(self, ctx, grad_req, *others, **named) if executor is None else executor

    return simple_bind


def _null(grad_req: Any) -> bool:
    """Whether no argument is to have a gradient."""
    requests = list(grad_req.values()) if isinstance(grad_req, dict) else grad_req
    return requests == "null" or (isinstance(requests, list) and 0 < requests.count("null") == len(requests))


def _bound(bind: Callable[..., Any], symbol: Any, named: dict[str, Any]) -> Any:
    """An executor whose parameters lie as in a file; None where no file is like it, or it shares them with another."""
    buffer, names = named.get("shared_buffer"), named.get("shared_arg_names")
    usual = isinstance(buffer, dict | None) and isinstance(names, list | None)
    if not usual or named.get("shared_exec") is not None or named.get("group2ctx"):
        return None
    tensors, size = _layout(symbol, named.get("type_dict") or {}, named)
    if not tensors or tensors.keys() & (buffer or {}):
        return None
    mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_NOHUGEPAGE)  # what is copied into it is little, here and there
    made, records = over(mapping, list(tensors.values()))
    arrays = dict(zip(tensors, made, strict=True))
    lent = (buffer or {}) | arrays
    others = [name for name in names or [] if name not in arrays]
    executor = bind(**named | {"shared_buffer": lent, "shared_arg_names": others})
    if buffer is not None:
        buffer.update((name, array) for name, array in lent.items() if name not in (names or []))
    _rooms[executor] = mapping, records, [executor.arg_dict[name] for name in tensors]
    return executor


def _layout(symbol: Any, types: Mapping[str, Any], shapes: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Parameters as they lie in that file which has most of them, and its size."""
    names = symbol.list_arguments()
    if not mapped_files.files or len(set(names)) < len(names):
        return {}, 0
    known = {name: shape for name, shape in shapes.items() if name in names and isinstance(shape, tuple)}
    all_shapes, _, _ = symbol.infer_shape_partial(**known)
    all_types, _, _ = symbol.infer_type_partial(**{name: types[name] for name in types if name in names})
    kinds = [(np.dtype(dtype or np.float32).name, shape) for dtype, shape in zip(all_types, all_shapes, strict=True)]
    wanted = dict(zip(names, kinds, strict=True))
    best: dict[str, Tensor] = {}
    size = most = 0
    for source in list(mapped_files.files):
        by_name = {tensor.name.removeprefix("arg:"): tensor for tensor in source.tensors if tensor.nbytes >= LEAST}
        fitting = {name: of for name, of in by_name.items() if wanted.get(name) == (of.dtype, of.shape)}
        nbytes = sum(tensor.nbytes for tensor in fitting.values())
        if nbytes > most:
            best, size, most = fitting, source.status.st_size, nbytes
    return best, size


class _Lying(NamedTuple):
    """A file, opened, and the places in it of arrays that are what it has there, by their names."""

    source: MappedFile
    file: io.FileIO
    tensors: dict[str, Tensor]


def _lying(arrays: Mapping[str, Any]) -> _Lying | None:
    """Those of the arrays that are of one file, which has most of them, and are what it has."""
    found: dict[MappedFile, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        if type(array) is not NDArray or array.context != mxnet.cpu():
            continue
        dtype = np.dtype(array.dtype)
        nbytes = array.size * dtype.itemsize
        address = _address(array) if nbytes >= LEAST else 0
        for source in list(mapped_files.files):
            here = source.start <= address < source.start + source.status.st_size
            if here and source.mapping() is not None:  # else another is mapped there by now
                tensor = Tensor(name, dtype.name, array.shape, address - source.start, nbytes)
                found.setdefault(source, {})[name] = tensor
    if found:
        most = max(found, key=lambda source: len(found[source]))
        with contextlib.suppress(OSError):
            return _Lying(source=most, tensors=most.unwritten(found[most]), file=most.open())
    return None


class _Copied(dict[str, Any]):
    """Parameters to be copied: of its items those are left out that *deal* has mapped when it is their turn."""

    def __init__(self, arrays: dict[str, Any], deal: Callable[[str, Any], bool]) -> None:
        super().__init__(arrays)
        self._deal = deal
        self.mapped = 0

    def items(self) -> Iterator[tuple[str, Any]]:  # type: ignore[override]
        for name, array in super().items():
            if self._deal(name, array):
                self.mapped += 1
            else:
                yield name, array


def _copying(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Executor.copy_params_from``, which goes through the items of what it is given."""

    @functools.wraps(original)
    def copy_params_from(self: Any, arg_params: Any, *others: Any, **named: Any) -> Any:
        room = _rooms.get(self)
        lying = _lying(arg_params) if room is not None and type(arg_params) is dict else None
        if room is None or lying is None or _rooms.pop(self, None) is None:
            return original(self, arg_params, *others, **named)
        copied = _Copied(arg_params, functools.partial(_map, room[0], self, lying))
        try:
            with lying.file:
                return original(self, copied, *others, **named)
        finally:
            if copied.mapped:  # from now on it may be folded, and so is not for us to map
                folder.watch(lying.source, *room)
            else:
                _rooms[self] = room

    return copy_params_from


def _map(room: mmap.mmap, executor: Any, lying: _Lying, name: str, array: Any) -> bool:
    """Have an executor's array in the room be like a given one, which is what the file has there; whether it is so."""
    tensor, target = lying.tensors.get(name), executor.arg_dict.get(name)
    if tensor is None or target is None or len(room) != lying.source.status.st_size:
        return False
    here, there = pages.address_of(room), lying.source.start
    begin, end = here + tensor.offset, here + tensor.offset + tensor.nbytes
    if (target.dtype, target.shape) != (array.dtype, array.shape) or _address(target) != begin:
        return False
    # Counts as a write, so that operators do not keep what they have made of the array.
    check_call(_LIB.MXNDArrayWaitToWrite(target.handle))
    first, last = pages.rounded(begin), end // PAGE * PAGE
    with contextlib.suppress(OSError):
        pages.map_over(first, last - first, lying.file.fileno(), first - here)
        for part, after in ((begin, first), (last, end)):
            ctypes.memmove(part, part - here + there, after - part)
        return True
    return False


def _address(array: Any) -> int:
    """Where an array lies, in the layout in which files have arrays, once all that is to write to it has done so."""
    address = ctypes.c_void_p()
    check_call(_get_data(array.handle, ctypes.byref(address)))
    return address.value or 0


def _initialising(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Module.init_params``, which copies parameters to arrays of the Module's, unless they are these arrays."""

    @functools.wraps(original)
    def init_params(self: Any, *arguments: Any, **named: Any) -> Any:
        given = named.get("arg_params")
        first = self.binded and not self.params_initialized and not self.for_training
        if first and type(given) is dict:
            again = _again(given, self._arg_params)
            self._arg_params |= again  # whose arrays nobody has got yet
            named["arg_params"] = given | again
        return original(self, *arguments, **named)

    return init_params


def _again(given: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays to take the place of those present: what is given, in another mapping of its file."""
    if not all(type(given.get(name)) is NDArray and given[name].shape == present[name].shape for name in present):
        return {}  # MXNet may raise an error, and has to have got as far as ever
    alike = [name for name, of in present.items() if (of.dtype, of.context) == (given[name].dtype, given[name].context)]
    lying = _lying({name: given[name] for name in alike})
    if lying is None:
        return {}
    with lying.file as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped_files.register(lying.source.path, lying.source.status, mapping)
    made, _ = over(mapping, list(lying.tensors.values()))
    return dict(zip(lying.tensors, made, strict=True))


def _postponing(original: Callable[..., Any]) -> Callable[..., Any]:
    """``zeros``, as a Module uses it to make arrays that it is going to write to in any case."""

    @functools.wraps(original)
    def postponed(shape: Any, ctx: Any = None, dtype: Any = None, stype: Any = None, **named: Any) -> Any:
        plain = ctx is None and stype in {None, "default"} and mxnet.current_context() == mxnet.cpu() and not named
        if plain and mapped_files.files and dtype in WITH_GRADIENT and np.prod(shape) >= LEAST:
            return zeros(WITH_GRADIENT[dtype], shape)
        return original(shape, ctx, dtype, stype, **named)

    return postponed
