"""What runs in a user's process: model files as tensors, without a copy. Needs nothing of the server.

::

    model = trimsfs.client.open("/models/resnet50/model.safetensors")
    weights = model.torch()          # or numpy(): a dictionary by name
"""

from os import PathLike

from trimsfs.client.model import Model
from trimsfs.formats import FormatError

__all__ = ["FormatError", "Model", "open"]


def open(path: str | PathLike[str]) -> Model:  # noqa: A001 - trimsfs.open(), as zarr.open() and Image.open()
    """Map a model file, on a mount or anywhere else.

    Raises OSError, and FormatError for a file that is not of a known format.
    """
    return Model(path)
