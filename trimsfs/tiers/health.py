"""The health of a blob: whether its bytes were compared with the store, were exchanged, lost, or are in quarantine."""

from trimsfs.errors import TrimsError


class Health:
    """What is known of the bytes of one blob beyond the checksums of its chunks. Touched from the event loop only."""

    __slots__ = ("digest", "lost", "quarantine", "revision")

    def __init__(self, digest: str | None = None) -> None:
        self.digest = digest
        """The store's digest, which all bytes have; empty where the store has none; None before they were compared."""
        self.quarantine: TrimsError | None = None
        """Why nobody gets the bytes any more; None while they may be served."""
        self.revision = 0
        """Grows whenever bytes were found wrong or were lost: what was computed from them at another revision is void.
        """
        self.lost = frozenset[int]()
        """Chunks that programs map and that did not reach the disk: they are no longer in the index."""

    @property
    def compared(self) -> bool:
        """Whether nothing is left to compare with the store."""
        return self.digest is not None

    @property
    def quarantined(self) -> bool:
        """Whether nobody may get the bytes."""
        return self.quarantine is not None

    def check(self) -> None:
        """Raises the TrimsError for which the bytes are in quarantine, if they are."""
        if self.quarantine is not None:
            raise self.quarantine.with_traceback(None)

    def bytes_changed(self, digest: str | None) -> None:
        """Bytes were lost or exchanged: *digest* is that of a blob that has not been compared."""
        self.revision += 1
        self.digest = digest
