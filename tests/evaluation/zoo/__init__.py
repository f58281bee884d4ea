"""The 45 networks of the TrIMS paper's evaluation, as plain MXNet with seeded random weights.

Programs of a user: with this package's parent directory on the path, Python 3.11 with MXNet 1.9 runs
``python -m zoo --list``, ``python -m zoo NAME DIRECTORY`` and ``python -m zoo.infer NAME DIRECTORY``.
"""

from .models import MODELS, Entry
from .weights import parameter_bytes, write_model

__all__ = ["MODELS", "Entry", "parameter_bytes", "write_model"]
