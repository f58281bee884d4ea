"""A model in several files; a program's first use of a shard's tensors opens the shard."""

import fnmatch
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trimsfs.client.model import Model, check_current, replaced_error
from trimsfs.client.patterns import Patterns, listed, matching
from trimsfs.client.shards import Shards, by_index, in_directory, is_index
from trimsfs.client.tensors import Tensors
from trimsfs.formats import FormatError, Tensor, TensorTable
from trimsfs.plugins import plugin

if TYPE_CHECKING:
    from mxnet.ndarray import NDArray

    from trimsfs.extras.folding.folding import Folded
    from trimsfs.extras.gpu.client import DeviceModel

PATIENCE_S, PAUSE_S = 2.0, 0.1
"""How long a lease may be of another version than the open file: the kernel believes control files for a second."""


def open_model(path: str | PathLike[str]) -> "Model | ShardedModel":
    """The model at a path, as `trimsfs.client.open` describes."""
    where = Path(path).absolute()
    if is_index(where.name):
        return ShardedModel(by_index(where))
    try:
        return Model(path)
    except IsADirectoryError:
        file_or_shards = in_directory(where)
    return Model(file_or_shards) if isinstance(file_or_shards, Path) else ShardedModel(file_or_shards)


class ShardedModel(Tensors):
    """A model in several files, and its tensors; a tensor's ``file`` is its shard.

    With an index, a call opens only the shards of the tensors that it needs, and leaves out tensors that the index
    lacks. Without one, the first call that needs a name opens all shards. Each shard is a `Model`, and waits until its
    whole file is on this host. Once the store replaces an open shard, opening another raises OSError, ESTALE.
    """

    def __init__(self, shards: Shards) -> None:
        self.path = shards.path
        self._shards = shards
        # As in `Model`: no lock; the first result wins.
        self._opened: dict[str, Model] = {}
        self._made: dict[str, Mapping[str, str]] = {}

    def __repr__(self) -> str:
        return f"<trimsfs.ShardedModel {str(self.path)!r} in {len(self._shards.files)} files>"

    @property
    def table(self) -> TensorTable:
        """Names, types, shapes and offsets of the tensors, shard by shard. Raises FormatError, OSError."""
        tensors = tuple(self.select())
        return TensorTable(self._shard(self._shards.files[0]).table.format, tensors)

    def select(self, tensors: Patterns = None) -> Iterator[Tensor]:
        """The tensors of the table that match, in its order. Raises LookupError, FormatError, OSError."""
        for file, names in self._chosen(tensors).items():
            selected = [tensor for tensor in self._shard(file).table.tensors if tensor.name in names]
            self._check(file, names, [tensor.name for tensor in selected])
            yield from (tensor._replace(file=file) for tensor in selected)

    def _raw(self, tensor: Tensor) -> memoryview:
        if tensor.file is None:
            raise ValueError(f"tensor {tensor.name!r} is not of the table of {self.path}")
        return self._shard(tensor.file)._raw(tensor._replace(file=None))

    def mxnet(self) -> "dict[str, NDArray]":
        """All tensors as MXNet arrays, by name: see `Model.mxnet`."""
        arrays = {file: self._shard(file).mxnet() for file in self._shards.files}
        return {tensor.name: arrays[tensor.file][tensor.name] for tensor in self.select() if tensor.file is not None}

    def fold(self) -> "Folded":
        """Fold each open shard: see `Model.fold`."""
        shards = list(self._opened.values())
        folded: Folded = plugin("client", "fold")([(shard.path, shard.inode, shard.mapping) for shard in shards])
        return folded

    def to(self, device: str | int, tensors: Patterns = None, memory: Literal["vmm", "ipc"] = "vmm") -> "DeviceModel":
        """Lease copies of the shards, or of the tensors that match, in a device's memory: see `Model.to`.

        Raises OSError, ESTALE, if the store has replaced an open shard: the copies could be of two versions.
        Without an index, this process also maps the files, to read their tensors' names.
        """
        patterns = None if tensors is None else listed(tensors)
        parts: list[tuple[DeviceModel, Collection[str]]] = []
        for file, names in self._chosen(patterns).items():
            here = None if patterns is None else [each for each in patterns if fnmatch.filter(names, each)]
            shard = self._shard(file)
            part = _copy_of_open_file(shard, partial(shard.to, device, here, memory))
            self._check(file, names, part.tensors)
            parts.append((part, names))
        check_current(list(self._opened.values()))
        joined: DeviceModel = plugin("client", "DeviceModel").joined(self.path, parts)
        return joined

    def _shard(self, file: str) -> Model:
        """The model of a shard. Raises OSError, also when the store has replaced an open shard."""
        model = self._opened.get(file)
        if model is None:
            model = Model(self._shards.directory / file)
            check_current(list(self._opened.values()))
            model = self._opened.setdefault(file, model)
        return model

    def _chosen(self, tensors: Patterns) -> dict[str, set[str]]:
        """The names that match, by shard, in order of the shards. Raises LookupError, FormatError, OSError."""
        shard_of = self._shard_of()
        chosen: dict[str, set[str]] = {file: set() for file in self._shards.files}
        for name in matching(shard_of, tensors, self.path):
            chosen[shard_of[name]].add(name)
        return {file: names for file, names in chosen.items() if names}

    def _shard_of(self) -> Mapping[str, str]:
        """The shard of each tensor, from the index or from the tables of all shards. Raises FormatError, OSError."""
        made = self._shards.shard_of or self._made.get("shard_of")
        if made is None:
            file_of: dict[str, str] = {}
            for file in self._shards.files:
                for tensor in self._shard(file).table.tensors:
                    if tensor.name in file_of:
                        where = f"in {file_of[tensor.name]} and in {file}"
                        raise FormatError(f"{self.path}: tensor {tensor.name!r} is {where}: open the shards one by one")
                    file_of[tensor.name] = file
            made = self._made.setdefault("shard_of", file_of)
        return made

    def _check(self, file: str, names: Collection[str], present: Collection[str]) -> None:
        """Check that a shard has all of its *names*. Raises FormatError."""
        missing = sorted(set(names).difference(present))
        if missing:
            shard = self._shards.directory / file
            why = f"{self.path.name} lists it there: index and shards belong to different models"
            raise FormatError(f"{shard}: no tensor {missing[0]!r}, but {why}")


def _copy_of_open_file(shard: Model, load: "Callable[[], DeviceModel]") -> "DeviceModel":
    """The copy of a shard: a lease is of what the path leads to now. Raises OSError, ESTALE, for another version."""
    give_up = time.monotonic() + PATIENCE_S
    while True:
        copy = load()
        if shard.generation in {None, copy.generation}:
            return copy
        if shard.replaced or time.monotonic() > give_up:
            raise replaced_error(shard.path)
        time.sleep(PAUSE_S)
