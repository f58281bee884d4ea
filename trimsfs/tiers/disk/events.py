"""The events that a disk tier reports to other components."""

from collections.abc import Callable
from dataclasses import dataclass

from trimsfs.errors import TrimsError
from trimsfs.tiers.blob import Blob


@dataclass(frozen=True, slots=True, kw_only=True)
class TierEvents:
    """The callbacks of a disk tier. They must not block.

    ``removed`` gets each blob that leaves the tier, before it is closed. ``suspected`` gets each blob in use whose file
    may be damaged, and the reason.
    """

    removed: Callable[[Blob], None]
    suspected: Callable[[Blob, TrimsError], None]
