"""Fine-tuned variants of a model: what transfer learning leaves of the weights that it began with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

VARIANTS = ("base", "head", "classes", "block", "statistics", "all")
"""The model itself; its last layer trained; that replaced by one for other classes; its last block and layer trained;
its last layer trained while batch norms went on gathering statistics; all trained."""


def variant_of(
    base: Mapping[str, Array],
    other: Mapping[str, Array],
    variant: str,
    *,
    head: Sequence[str],
    block: Sequence[str],
) -> dict[str, Array]:
    """The weights of a variant by name; *other* is the model with other classes.

    *head* and *block* are what the names of the last layer's and the last block's weights begin with.
    """

    def trained(name: str) -> bool:
        is_statistic = "running_" in name or "num_batches" in name
        return (
            variant == "all"
            or (variant in {"head", "block", "statistics"} and name.startswith(tuple(head)))
            or (variant == "block" and name.startswith(tuple(block)))
            or (variant == "statistics" and is_statistic)
        )

    if variant == "classes":
        return {name: other[name] if name.startswith(tuple(head)) else array for name, array in base.items()}
    return {name: _trained(array, name) if trained(name) else array for name, array in base.items()}


def _trained(array: Array, name: str) -> Array:
    """Other values of the same type and shape."""
    if array.dtype.kind != "f":
        return np.asarray(array + 1, array.dtype)
    noise = np.random.default_rng(len(name)).standard_normal(array.shape)
    return np.asarray(array + 0.01 * noise, array.dtype)
