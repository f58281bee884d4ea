"""A model file, mapped copy-on-write: pages that a process writes to become its own, all others stay shared."""

import mmap
import os
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimsfs.client.file_state import ensure_local, explained, is_replaced
from trimsfs.client.folding import Foldable, Folded
from trimsfs.client.mapping import map_file, mapped
from trimsfs.client.patterns import Patterns, matching
from trimsfs.client.tensors import Tensors
from trimsfs.formats import BufferSource, FormatError, Tensor, TensorTable, parse

if TYPE_CHECKING:
    from mxnet.ndarray import NDArray

    from trimsfs.client.gpu import DeviceModel


class Model(Tensors):
    """A model file and its tensors. Tensors keep the mapping, and so the file's generation, while they live.

    The constructor opens the file. The first use of its content maps it, after waiting until all of it is on this host:
    what the store does not give raises OSError, and is no SIGBUS later. ``inode`` is its inode number.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the model
        except OSError as error:
            raise explained(error, os.fspath(path), os.fspath(path)) from None
        self.inode = os.fstat(self._file.fileno()).st_ino
        # Computed on first use. Without a lock, which a forked child could find held: the first result counts.
        self._made: dict[str, Any] = {}
        self._others: dict[str, mmap.mmap | bytes] = {}

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    @property
    def replaced(self) -> bool:
        """Whether its mount knows that the store has another content for the file by now."""
        return is_replaced(self._file)

    @property
    def mapping(self) -> mmap.mmap | bytes:
        """The whole file. Raises OSError, as when the store fails."""
        made: mmap.mmap | bytes | None = self._made.get("mapping")
        if made is None:
            mapping = mapped(self.path, self._file, common=bool(ensure_local(self._file)))
            made = self._made.setdefault("mapping", mapping)
        return made

    @property
    def table(self) -> TensorTable:
        """Names, types, shapes and offsets of the tensors. Raises FormatError, and OSError as `mapping`."""
        made: TensorTable | None = self._made.get("table")
        if made is None:
            try:
                table = parse(BufferSource(memoryview(self.mapping)), self.path.name)
            except FormatError as error:
                raise FormatError(f"{self.path}: {error}") from None
            made = self._made.setdefault("table", table)
        return made

    def to(self, device: str | int, tensors: Patterns = None, memory: Literal["vmm", "ipc"] = "vmm") -> "DeviceModel":
        """Lease the copy in a device's memory that all processes share, or a part of it. Needs a mount with a GPU tier.

        *device* is ``"cuda:1"`` or ``1`` by the ordinal in this process, ``"GPU-…"`` by UUID, or ``"cuda"`` for the
        first. *tensors* is one pattern of `fnmatch` or several; the server loads only the tensors that match.
        *memory* is ``"vmm"``, which this process can only read, or ``"ipc"``, which every holder can write to and which
        ends with the server.

        Waits until the copy is loaded. The file may be of any format, and is not mapped in this process. Raises
        GpuError.
        """
        from trimsfs.client.gpu import load  # noqa: PLC0415 - most programs use no GPU

        return load(self.path, self._file, device, tensors, memory)

    def select(self, tensors: Patterns = None) -> list[Tensor]:
        """The tensors of the table that match, in its order. Raises LookupError, and as `table`."""
        found = self.table.tensors
        names = matching([tensor.name for tensor in found], tensors, self.path)
        return [tensor for tensor in found if tensor.name in names]

    def raw(self, tensor: Tensor) -> memoryview:
        """The bytes of a tensor of the table; writes stay in this process."""
        view = memoryview(self._buffer(tensor))[tensor.offset : tensor.offset + tensor.nbytes]
        if len(view) != tensor.nbytes:
            raise EOFError(f"{self.path}: tensor {tensor.name!r}: {tensor.file} is too short")
        return view

    def mxnet(self) -> "dict[str, NDArray]":
        """All tensors as MXNet arrays, by name, on the CPU. Raises TypeError for types that MXNet lacks.

        They share the mapping: what MXNet writes shows in this model's tensors of other frameworks.
        """
        from trimsfs.client.mxnet.load import arrays  # noqa: PLC0415

        try:
            return arrays(self.table, self.mapping)
        except TypeError as error:
            raise TypeError(f"{self.path}: {error}") from None

    def fold(self) -> Folded:
        """Share the pages that this process wrote with processes of the same user that wrote the same bytes.

        No thread may write to the mapping meanwhile. Needs a mount, and Linux 6.7; raises OSError before that.
        """
        if isinstance(self.mapping, bytes):
            return Folded(shared=0, passed_on=0, own=0)
        return Foldable(self.path, self.inode, self.mapping).fold()

    def _buffer(self, tensor: Tensor) -> mmap.mmap | bytes:
        if tensor.file is None:
            return self.mapping
        mapping = self._others.get(tensor.file)
        if mapping is None:
            with open(self.path.parent / tensor.file, "rb", buffering=0) as file:
                ensure_local(file)
                mapping = self._others[tensor.file] = map_file(file)
        return mapping
