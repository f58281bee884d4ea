"""The events of a disk tier, of which other components hear."""

from collections.abc import Callable
from dataclasses import dataclass

from trimsfs.errors import TrimsError
from trimsfs.tiers.blob import Blob


@dataclass(frozen=True, slots=True, kw_only=True)
class TierEvents:
    """The listeners to a disk tier. They must not block.

    ``removed`` hears of each blob that leaves the tier, before it is closed. ``suspected`` hears of each blob in use
    whose file may be damaged, and why.
    """

    removed: Callable[[Blob], None]
    suspected: Callable[[Blob, TrimsError], None]
