"""A model file, mapped copy-on-write: a process gets private pages where it writes, and shares all others."""

import errno
import mmap
import os
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trimsfs.client.file_state import ensure_local, explained, generation_of, is_replaced
from trimsfs.client.model_mapping import mapped
from trimsfs.client.patterns import Patterns, matching
from trimsfs.client.tensors import Tensors
from trimsfs.formats import BufferSource, FormatError, Tensor, TensorTable, parse
from trimsfs.plugins import plugin

if TYPE_CHECKING:
    from mxnet.ndarray import NDArray

    from trimsfs.extras.folding.folding import Folded
    from trimsfs.extras.gpu.client import DeviceModel


class Model(Tensors):
    """A model file and its tensors. Tensors keep the mapping, and so the file's generation, alive.

    The constructor opens the file. The first use of its content waits until all of it is on this host, then maps it. If
    the store fails, that use raises OSError; a later access never raises SIGBUS for it. ``inode`` is its inode number.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = Path(path).absolute()
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed with the model
        except OSError as error:
            raise explained(error, os.fspath(path), os.fspath(path)) from None
        self.inode = os.fstat(self._file.fileno()).st_ino
        # Computed on first use; the first result wins. No lock: a forked child could inherit it held.
        self._made: dict[str, Any] = {}
        self._others: dict[str, Model] = {}

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __repr__(self) -> str:
        return f"<trimsfs.Model {str(self.path)!r}>"

    @property
    def replaced(self) -> bool:
        """Whether the store has replaced the file since it was opened, as far as the mount knows."""
        return is_replaced(self._file)

    @property
    def generation(self) -> str | None:
        """The generation of the file that is open; None off a mount."""
        return generation_of(self._file)

    @property
    def mapping(self) -> mmap.mmap | bytes:
        """The whole file, mapped; ``b""`` if it is empty. Raises OSError, for example when the store fails."""
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
        """Lease a copy of the file, or of some tensors, in a device's memory. Needs a mount with a GPU tier.

        Processes share the copy, as the mount's ``gpu_sharing`` allows. *device* is ``"cuda:1"`` or ``1`` by the
        ordinal in this process, ``"GPU-…"`` by UUID, or ``"cuda"`` for the first. *tensors* is one `fnmatch` pattern or
        several; the server loads only the tensors that match. *memory* is ``"vmm"``, which is read-only, or ``"ipc"``,
        which every holder can write to and which is lost when the server ends.

        Waits until the copy is loaded. The file may have any format; this process does not map it. Raises GpuError.
        """
        copy: DeviceModel = plugin("client", "to")(self.path, self._file, device, tensors, memory)
        return copy

    def select(self, tensors: Patterns = None) -> list[Tensor]:
        """The tensors of the table that match, in its order. Raises LookupError, and as `table`."""
        all_tensors = self.table.tensors
        names = matching([tensor.name for tensor in all_tensors], tensors, self.path)
        return [tensor for tensor in all_tensors if tensor.name in names]

    def _raw(self, tensor: Tensor) -> memoryview:
        view = memoryview(self._buffer(tensor))[tensor.offset : tensor.offset + tensor.nbytes]
        if len(view) != tensor.nbytes:
            raise EOFError(f"{self.path}: tensor {tensor.name!r}: {tensor.file} is too short")
        return view

    def mxnet(self) -> "dict[str, NDArray]":
        """All tensors as MXNet arrays, by name, on the CPU. Raises TypeError for types that MXNet lacks.

        The arrays share the mapping: this model's tensors in other frameworks see what MXNet writes.
        """
        try:
            made: dict[str, NDArray] = plugin("client", "mxnet")(self.table, self.mapping)
            return made
        except TypeError as error:
            raise TypeError(f"{self.path}: {error}") from None

    def fold(self) -> "Folded":
        """Share the pages that this process wrote with processes of the same user that wrote the same bytes.

        No thread may write to the mapping meanwhile. Does nothing off a mount. Raises OSError before Linux 6.7.
        """
        folded: Folded = plugin("client", "fold")([(self.path, self.inode, self.mapping)])
        return folded

    def _buffer(self, tensor: Tensor) -> mmap.mmap | bytes:
        if tensor.file is None:
            return self.mapping
        other = self._others.get(tensor.file)
        if other is None:
            other = Model(self.path.parent / tensor.file)
            check_current([self, *self._others.values()])
            other = self._others.setdefault(tensor.file, other)
        return other.mapping


def check_current(models: Collection[Model]) -> None:
    """Check that a file which is opened now is of the version of those that are open. Raises OSError, ESTALE."""
    for model in models:
        if model.replaced:
            raise replaced_error(model.path)


def replaced_error(path: Path) -> OSError:
    """The error of a model of several files of which the store has replaced one that is open."""
    why = "has been replaced in the store since it was opened: open the model again"
    return OSError(errno.ESTALE, why, str(path))
