"""Parsers of model formats: which tensors a file holds, and where.

They do no I/O of their own, and limit time and memory: a hostile file raises FormatError. The caller passes a
``Source``: a mapped file, or one that it fetches piece by piece.
"""

import codecs
import importlib
from collections.abc import Callable

from trimsfs.formats.source import BufferSource, Source
from trimsfs.formats.table import DTYPE_BITS, FormatError, Tensor, TensorTable

__all__ = ["DTYPE_BITS", "BufferSource", "FormatError", "Source", "Tensor", "TensorTable", "load_readers", "parse"]

_PROBED = 16
_READERS = {
    (0x112).to_bytes(8, "little"): "mxnet",
    b"GGUF": "gguf",
    b"\x93NUMPY": "numpy",
    b"PK\3\4": "zipped",
}


def parse(source: Source, name: str) -> TensorTable:
    """The tensors of a model file: MXNet, safetensors, GGUF, NumPy, PyTorch or, by the suffix of its *name*, ONNX.

    Raises FormatError for another format and for a malformed file, and OSError from the source.
    """
    try:
        return _parse(source, name)
    except MemoryError:
        raise FormatError("there is not enough memory for its description") from None


def _parse(source: Source, name: str) -> TensorTable:
    if source.size == 0:
        raise FormatError("empty file")
    begin = bytes(source.read(0, min(_PROBED, source.size)))
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= source.size:
        return _reader("safetensors")(source)
    for magic, form in _READERS.items():
        if begin.startswith(magic):
            return _reader(form)(source)
    if name.endswith(".onnx"):
        return _reader("onnx")(source)
    raise FormatError("unknown format: none of MXNet, safetensors, GGUF, npy, npz, PyTorch and ONNX")


def load_readers() -> None:
    """Import the parsers of all formats, for a process whose sandbox forbids it later."""
    for form in {*_READERS.values(), "safetensors", "onnx"}:
        _reader(form)
    codecs.lookup("cp437")  # decodes names in zip archives


def _reader(form: str) -> Callable[[Source], TensorTable]:
    """The parser of a format, imported on first use, because each import would slow the start of programs."""
    function: Callable[[Source], TensorTable] = importlib.import_module(f"trimsfs.formats.{form}").parse
    return function
