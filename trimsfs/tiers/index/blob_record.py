"""What the index tells of one blob."""

from dataclasses import dataclass

from trimsfs.types import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRecord:
    """A blob as the index knows it; ``bytes`` is how much of it is on disk, ``digest`` as that of a `Residency`."""

    token: str
    generation: Generation
    pinned: bool
    uses: int
    last_used: float
    bytes: int
    digest: str | None

    @classmethod
    def empty(cls, token: str, generation: Generation) -> "BlobRecord":
        """The record of a generation of which nothing is here."""
        return cls(token=token, generation=generation, pinned=False, uses=0, last_used=0.0, bytes=0, digest=None)
