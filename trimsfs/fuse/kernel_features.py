"""Kernel features: what the kernel of this host lacks of FUSE, and what that costs a mount."""

import os
from typing import TYPE_CHECKING

from trimsfs.fuse import _libfuse

if TYPE_CHECKING:
    from trimsfs.fuse._libfuse import _Connection

EXPIRES_NAMES, PRUNES = 38, 45
"""Minor versions of the FUSE protocol that brought FUSE_EXPIRE_ONLY and FUSE_NOTIFY_PRUNE."""


def lacking(connection: "_Connection") -> list[str]:
    """What the kernel lacks beside passthrough, by what it has agreed to: a line each, with the Linux that has it.

    An old libfuse asks for no direct reads: then nothing is told of them.
    """
    direct = connection["direct"] or not _libfuse.PASSTHROUGH_BUILT
    features = (
        (connection["resends"], "takeover (Linux 6.9)", "the mount ends with its server"),
        (direct, "direct reads with mappings (Linux 6.6)", "files that still come are in memory twice"),
        (
            connection["minor"] >= EXPIRES_NAMES,
            "expiry of names (Linux 6.2)",
            "files in use show as deleted once the store has replaced them",
        ),
        (connection["minor"] >= PRUNES, "pruning of names (Linux 6.18)", "names that nobody uses stay in memory"),
    )
    return [f"no {feature}: {cost}" for there, feature, cost in features if not there]


def kernel_facts() -> dict[str, object]:
    """The version of Linux that runs, and what it lacks, once the connection is agreed on."""
    return {"release": os.uname().release, "lacks": lacking(_libfuse.connection())}
