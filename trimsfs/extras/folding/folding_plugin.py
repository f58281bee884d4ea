"""How derived blobs plug into a server."""

from trimsfs.extras.folding.derived_blobs import DerivedBlobs
from trimsfs.options import MountOptions
from trimsfs.server.plugin import Core, ServerPlugin


class FoldingPlugin(ServerPlugin):
    """Derived blobs."""

    def __init__(self, options: MountOptions, *, alone: bool) -> None:
        del options, alone

    def build(self, core: Core) -> DerivedBlobs:
        """The derived blobs of a mount, if its options allow them."""
        disk = core.tiers.disk
        return DerivedBlobs(
            disk.blobs, disk.space, disk.residencies, core.tiers.passthrough, allowed=core.options.derived
        )
