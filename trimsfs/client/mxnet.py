"""MXNet: parameters that are loaded from a mount are arrays over the mapped file, without a copy.

`install` replaces ``mx.nd.load`` and what Gluon and Modules do with what it gives. Off a mount, and for files or
contexts that this cannot serve, MXNet's own code runs. Written for MXNet 1.9, whose functions it wraps.
"""

import functools
import importlib
import io
import logging
import mmap
import os
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mxnet
import numpy as np
from mxnet import autograd
from mxnet.base import MXNetError
from mxnet.gluon.block import Block
from mxnet.gluon.parameter import Parameter, ParameterDict
from mxnet.util import is_np_array, is_np_shape

from trimsfs.client import pages
from trimsfs.client.model import Model, mapped
from trimsfs.client.mxnet_arrays import Records, fits, over, read, zeros
from trimsfs.client.mxnet_folding import Folder
from trimsfs.client.native import library
from trimsfs.client.places import bring
from trimsfs.formats import BufferSource, FormatError, Tensor, parse

log = logging.getLogger(__name__)

WITH_GRADIENT: dict[type, str] = {np.float16: "float16", np.float32: "float32", np.float64: "float64"}


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


class Source:
    """A file of a mount, which never changes, and where it is mapped."""

    def __init__(self, path: Path, status: os.stat_result, mapping: mmap.mmap) -> None:
        self.path, self.status = path, status
        self.start = pages.address_of(mapping)
        self._end = self.start + len(mapping)
        self.mapping = weakref.ref(mapping)
        # What is read when it is needed. No lock, which a process forked meanwhile would find held: the first counts.
        self._read: dict[str, Any] = {}

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Its arrays; none once it is mapped no more."""
        found: Sequence[Tensor] | None = self._read.get("tensors")
        if found is None:
            mapping = self.mapping()
            read = () if mapping is None else parse(BufferSource(memoryview(mapping)), self.path.name).tensors
            found = self._read.setdefault("tensors", read)
        return found

    @property
    def parts(self) -> Sequence[_Part]:
        """What is mapped there, some of it from other files with the same bytes.

        Reading this takes longer than all else of loading a model. It has been asked for before anything of that is
        folded, and so it never tells of what folding maps.
        """
        found: Sequence[_Part] | None = self._read.get("parts")
        if found is None:
            read = list(_parts(self.start, self._end))
            found = self._read.setdefault("parts", read)
        return found

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
        for start, end, file in _parts(self.start, self._end):
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


def remember(path: Path, status: os.stat_result, mapping: mmap.mmap) -> Source:
    """A file of a mount is mapped from now on."""
    source = Source(path, status, mapping)
    sources.append(source)
    weakref.finalize(mapping, sources.remove, source).atexit = False
    return source


def watch(source: Source, mapping: mmap.mmap, records: Records, arrays: Sequence[Any]) -> None:
    """Fold a mapping of a file that is remembered, once the process has rewritten it."""
    _folder.watch(source.path, source.status.st_ino, mapping, records, arrays, lambda: source.parts)


def install() -> None:
    """Have MXNet load without a copy from now on, in this process. A second call does nothing.

    Raises OSError without the library of what is in C.
    """
    if getattr(mxnet.nd.load, "__trimsfs__", False):
        return
    library()
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
            common = bring(file)
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
    watch(remember(path, status, mapping), mapping, records, made)
    if _lent.arrays is not None:
        _lent.arrays |= {id(array): array for array in made}
    return made if names is None else dict(zip(names, made, strict=True))


def arrays(model: Model) -> dict[str, Any]:
    """All tensors of a model as arrays by name. Raises TypeError for what MXNet has no array of."""
    tensors, mapping = model.table.tensors, model.mapping
    for tensor in tensors:
        if not fits(tensor):
            kind = f"tensor {tensor.name!r} of {tensor.dtype} and shape {tensor.shape} at {tensor.offset}"
            raise TypeError(f"{model.path}: {kind}: MXNet has no such array; use raw()")
    made, _ = ([], None) if isinstance(mapping, bytes) else over(mapping, tensors)
    _folder.start()
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
