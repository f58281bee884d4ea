"""The health of a blob: whether its bytes are compared with the store, lost, damaged or in quarantine."""

from trimsfs.errors import TrimsError


class Health:
    """The state of a blob's bytes beyond the checksums of its chunks. Only the event loop touches it."""

    __slots__ = ("digest", "lost", "quarantine", "revision")

    def __init__(self, digest: str | None = None) -> None:
        self.digest = digest
        """The store's digest, which the bytes match; empty without one to compare with; None if not compared yet."""
        self.quarantine: TrimsError | None = None
        """Why the bytes must not be served; None while they may be."""
        self.revision = 0
        """Grows whenever bytes are lost or found wrong: discard results computed at another revision."""
        self.lost = frozenset[int]()
        """Chunks that programs map but that could not be synced: the index no longer has them."""

    @property
    def compared(self) -> bool:
        """Whether the bytes match the store's digest, or there is no digest to compare with."""
        return self.digest is not None

    @property
    def quarantined(self) -> bool:
        """Whether the bytes must not be served."""
        return self.quarantine is not None

    def check(self) -> None:
        """Raise the reason of the quarantine, a TrimsError, if the blob is in quarantine."""
        if self.quarantine is not None:
            raise self.quarantine.with_traceback(None)

    def bytes_changed(self, digest: str | None) -> None:
        """Record that bytes were lost or changed; *digest* is None, or empty for a blob that is never compared."""
        self.revision += 1
        self.digest = digest
