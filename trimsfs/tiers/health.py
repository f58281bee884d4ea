"""The health of a blob: whether its bytes were compared with the store, changed, lost or put into quarantine."""

from trimsfs.errors import TrimsError


class Health:
    """What is known of a blob's bytes beyond the checksums of its chunks. Only the event loop touches it."""

    __slots__ = ("digest", "lost", "quarantine", "revision")

    def __init__(self, digest: str | None = None) -> None:
        self.digest = digest
        """The store's digest, which the bytes match; empty if there is none to compare with; None if not compared."""
        self.quarantine: TrimsError | None = None
        """Why the bytes must not be served; None while they may be."""
        self.revision = 0
        """Grows whenever bytes are lost or found wrong: results computed at another revision are void."""
        self.lost = frozenset[int]()
        """Chunks that programs map but that did not reach the disk: the index no longer has them."""

    @property
    def compared(self) -> bool:
        """Whether the bytes were compared with the store, or have no digest to compare with."""
        return self.digest is not None

    @property
    def quarantined(self) -> bool:
        """Whether the bytes must not be served."""
        return self.quarantine is not None

    def check(self) -> None:
        """Raises the reason of the quarantine, a TrimsError, if the blob is in quarantine."""
        if self.quarantine is not None:
            raise self.quarantine.with_traceback(None)

    def bytes_changed(self, digest: str | None) -> None:
        """Record that bytes were lost or changed. *digest* is that of an uncompared blob."""
        self.revision += 1
        self.digest = digest
