"""Sizes: bytes, with or without a unit."""

import re
from typing import Annotated

from pydantic import BeforeValidator, ByteSize

LEAST_SIZE = 1_000_000
"""Bytes of the smallest budget but 0: who writes less has forgotten the unit, or means something else."""


def _spelled(value: object) -> object:
    """A size as its parser spells it, for one of Kubernetes, as ``5Gi``.

    Refuses what the parser would leave out at the end, as ``,5GiB`` of ``1,5GiB``.
    """
    if not isinstance(value, str):
        return value
    parts = re.fullmatch(r"\s*((?:\d*\.)?\d+)\s*([A-Za-z]*)\s*", value)
    if parts is None:
        raise ValueError("is not a size such as 10GiB")
    number, unit = parts.groups()
    return f"{number}{unit}B" if re.fullmatch("[kmgtp]i", unit, re.IGNORECASE) else value


Size = Annotated[ByteSize, BeforeValidator(_spelled)]


def too_small(size: int | None, written: object) -> str | None:
    """What is wrong with a budget that holds no model, by how it was *written*; None for any other."""
    if size is None or not 0 < size < LEAST_SIZE:
        return None
    if isinstance(written, str) and re.search("[A-Za-z]", written):
        return f"is {size} bytes, too small to hold a model: write {LEAST_SIZE // 10**6}MB or more, as in 10GiB"
    return f"is {size} bytes, which hold no model: write a unit, as in {size}GiB"
