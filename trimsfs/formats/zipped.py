"""Parses zip archives: PyTorch's, recognised by their pickle, and npz."""

from trimsfs.formats import numpy, torch
from trimsfs.formats.archive import Archive
from trimsfs.formats.source import Source
from trimsfs.formats.table import TensorTable


def parse(source: Source) -> TensorTable:
    """The table of a PyTorch file or of a ``.npz`` file. Raises FormatError, and OSError from the source."""
    members = Archive(source)
    if any(member.filename.endswith(torch.PICKLE) for member in members.members()):
        return torch.parse(source, members)
    return numpy.parse_npz(source, members)
