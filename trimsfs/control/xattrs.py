"""The extended attributes ``user.trims.*`` of files."""

import json
from collections.abc import Callable, Sequence

from trimsfs.control.authorisation import Caller
from trimsfs.control.extra import Extra
from trimsfs.control.reports import Reports
from trimsfs.control.tensor_tables import TensorTables
from trimsfs.namespace.inodes import Inode, InodeKind
from trimsfs.namespace.tree import Namespace
from trimsfs.tiers.disk.interfaces import KnownBlobs, Residencies, Residency
from trimsfs.types import Generation

PREFIX = "user.trims."
PROBLEM = f"{PREFIX}problem"
LIMIT = 65536
"""Bytes of the longest value that the kernel accepts."""


class Xattrs:
    """Answers for the extended attributes of files. Reading one changes nothing.

    *problem* returns why no fetch of a generation starts now or its copy must not be read, or None.
    """

    def __init__(
        self,
        namespace: Namespace,
        blobs: KnownBlobs,
        residencies: Residencies,
        tables: TensorTables,
        extras: Sequence[Extra],
        reports: Reports,
        *,
        problem: Callable[[Generation], str | None],
    ) -> None:
        self._residencies = residencies
        self._tables = tables
        self._extras = extras
        self._problem = problem
        # These need no lookup in the disk tier.
        self._of_identity: dict[str, Callable[[Generation], str]] = {
            "etag": lambda generation: generation.etag,
            "generation": blobs.token,
            "replaced": lambda generation: _boolean(namespace.is_replaced(generation)),
        }
        self._of_residency: dict[str, Callable[[Residency], str]] = {
            "digest": lambda here: here.digest or "",
            "pinned": lambda here: _boolean(here.pinned),
            "residency": lambda here: json.dumps(reports.residency(here)),
            "verified": lambda here: _boolean(here.verified),
        }

    def names(self, inode: Inode) -> list[str]:
        """The full names of an inode's attributes."""
        names = [*self._of_identity, *self._of_residency]
        return [PREFIX + name for name in names] if inode.kind is InodeKind.OBJECT else []

    async def value(self, inode: Inode, name: str, caller: Callable[[], Caller]) -> bytes | None:
        """The value of an attribute by its full name; None if there is no such attribute.

        Not among `names`: ``tensors``, which may need a fetch; ``problem``, why fetches of the file fail now; and those
        of extras.
        """
        generation, short = inode.generation, name.removeprefix(PREFIX)
        if short == name or generation is None or inode.kind is not InodeKind.OBJECT:
            return None
        if short == "tensors":
            table = (await self._tables.table(generation)).content
            return table if len(table) <= LIMIT else None
        if short == "problem":
            problem = self._problem(generation)
            return None if problem is None else problem.encode(errors="surrogateescape")
        if short in self._of_identity:
            return self._of_identity[short](generation).encode()
        if short in self._of_residency:
            return self._of_residency[short](await self._residencies.of(generation)).encode()
        values = (extra.xattr(generation, short, caller) for extra in self._extras)
        return next((value for value in values if value is not None), None)


def _boolean(value: bool) -> str:
    return "true" if value else "false"
