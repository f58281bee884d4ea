"""The index record of one blob."""

from dataclasses import dataclass

from trimsfs.types import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRecord:
    """A blob in the index: ``bytes`` are on disk; ``digest`` means the same as in `Residency`."""

    token: str
    generation: Generation
    pinned: bool
    uses: int
    last_used: float
    bytes: int
    digest: str | None

    @classmethod
    def empty(cls, token: str, generation: Generation) -> "BlobRecord":
        """The record of a generation that is not in the index."""
        return cls(token=token, generation=generation, pinned=False, uses=0, last_used=0.0, bytes=0, digest=None)
