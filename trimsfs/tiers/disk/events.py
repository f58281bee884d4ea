"""The events of a disk tier that other components hear of."""

from collections.abc import Callable
from dataclasses import dataclass

from trimsfs.errors import TrimsError
from trimsfs.tiers.blob import Blob


@dataclass(frozen=True, slots=True, kw_only=True)
class TierEvents:
    """Who hears of what happens to blobs. Neither may wait.

    ``removed`` hears of each blob that leaves the tier, before it is closed; ``suspected`` of each blob in use whose
    file may not be what it was, and why.
    """

    removed: Callable[[Blob], None]
    suspected: Callable[[Blob, TrimsError], None]
