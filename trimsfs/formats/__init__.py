"""Model files, read for what tensors they hold and where. Pure and bounded: a hostile file gives a FormatError.

Whoever parses lends a ``Source``: a mapped file, or one that comes piece by piece.
"""

from trimsfs.formats import archive, gguf, mxnet, numpy, onnx, safetensors, torch
from trimsfs.formats.archive import Archive
from trimsfs.formats.source import BufferSource, Source
from trimsfs.formats.table import DTYPE_BITS, FormatError, Tensor, TensorTable

__all__ = ["DTYPE_BITS", "BufferSource", "FormatError", "Source", "Tensor", "TensorTable", "parse"]

_PROBED = 16


def parse(source: Source, name: str) -> TensorTable:
    """The tensors of a model file: MXNet's, safetensors, GGUF, NumPy's, PyTorch's or, by its *name*, ONNX.

    Raises FormatError for any other file and for one that breaks the rules of its format, and OSError from the source.
    """
    begin = bytes(source.read(0, min(_PROBED, source.size)))
    if begin.startswith(mxnet.MAGIC):
        return mxnet.parse(source)
    if begin.startswith(gguf.MAGIC):
        return gguf.parse(source)
    if begin.startswith(numpy.MAGIC):
        return numpy.parse_npy(source)
    if begin.startswith(archive.MAGIC):
        members = Archive(source)
        if any(member.filename.endswith(torch.PICKLE) for member in members.members()):
            return torch.parse(source, members)
        return numpy.parse_npz(source, members)
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= source.size:
        return safetensors.parse(source)
    if name.endswith(onnx.SUFFIX):
        return onnx.parse(source)
    raise FormatError("not a format that is known: MXNet, safetensors, GGUF, npy, npz, PyTorch or ONNX")
