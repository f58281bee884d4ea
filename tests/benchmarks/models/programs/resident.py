"""A model that is loaded and has inferred once when this is imported: by the module ``TRIMSFS_BENCH_PROGRAM`` beside
this one, from the directory ``TRIMSFS_BENCH_MODEL``."""

import importlib
import os
from collections.abc import Callable

_infer: Callable[[], bytes] = importlib.import_module(
    f"tests.benchmarks.models.programs.{os.environ['TRIMSFS_BENCH_PROGRAM']}"
).load(os.environ["TRIMSFS_BENCH_MODEL"])
_infer()


def load(_path: str) -> Callable[[], bytes]:
    """That model."""
    return _infer
