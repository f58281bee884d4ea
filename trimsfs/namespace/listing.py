"""Listings: the entries of a directory, in columns because it may have a million names."""

import enum
import hashlib
import os
import random
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import ItemsView, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from typing import overload

import trio

from trimsfs.stores.base import Page, moment
from trimsfs.types import Generation, Symlink

CONTROL_NAME = b".trims"
"""Reserved in every directory for the control files."""
NAME_MAX = 255
STEP = 16
"""Names from one mark to the next."""
SLICE = 250
"""Names processed without a pause: other requests wait for about a millisecond."""


class NonObject(enum.Enum):
    """What a name can be besides an object."""

    DIRECTORY = "directory"
    ABSENT = "absent"
    UNREADABLE = "unreadable"


Entry = Generation | Symlink | NonObject
"""What a name in a directory is: an object, a symbolic link, a directory, absent, or unreadable (trimsfs may not learn
its type)."""

_KINDS = (None, NonObject.DIRECTORY, NonObject.UNREADABLE)
"""What a row is, by its byte in the column of kinds; None for an object."""
_WHOLE_SIZE = 500
"""Estimated bytes of memory for an object that is kept as it is."""
_SYMLINK = len(_KINDS)
"""That byte of a symbolic link, whose target is in the column of ETags."""


def possible(name: bytes) -> bool:
    """Whether a name from a store can be a file name."""
    return 0 < len(name) <= NAME_MAX and name not in {b".", b"..", CONTROL_NAME} and b"/" not in name and 0 not in name


class _Texts(Sequence[bytes]):
    """Byte strings in one buffer. Once sorted, ``rows`` has for each place the number of the row that was appended."""

    __slots__ = ("data", "ends", "rows")

    def __init__(self) -> None:
        self.data = bytearray()
        self.ends = array("I", [0])
        self.rows: Sequence[int] = range(0)

    def append(self, text: bytes) -> None:
        self.data += text
        self.ends.append(len(self.data))

    def row(self, row: int) -> bytes:
        """The string appended as this row."""
        return bytes(self.data[self.ends[row] : self.ends[row + 1]])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> bytes: ...
    @overload
    def __getitem__(self, place: slice) -> list[bytes]: ...
    def __getitem__(self, place: int | slice) -> bytes | list[bytes]:
        if isinstance(place, slice):
            return list(map(self.row, self.rows[place]))
        return self.row(self.rows[place])

    @property
    def size(self) -> int:
        """Bytes of memory."""
        rows = self.rows.itemsize * len(self.rows) if isinstance(self.rows, array) else 0
        return len(self.data) + len(self.ends) * self.ends.itemsize + rows


class _Items(ItemsView[bytes, Entry]):
    """The entries of a listing, iterated without a search for each name."""

    def __init__(self, listing: "Listing") -> None:
        super().__init__(listing)
        self._listing = listing

    def __iter__(self) -> Iterator[tuple[bytes, Entry]]:
        return self._listing.items_from(0)


class Listing(Mapping[bytes, Entry]):
    """The entries of the directory *prefix* by name, in order of name.

    It is filled page by page and then sorted once, with pauses for other requests; after that it never changes.
    ``hidden`` counts keys that cannot be shown. A name takes about 90 bytes, as entries are made on demand.
    """

    def __init__(self, prefix: str = "") -> None:
        self.prefix = prefix
        self.hidden = 0
        self.names = _Texts()
        self._etags = _Texts()
        self._kinds = bytearray()
        self._sizes = array("q")
        self._modified = array("q")
        self._linked: dict[int, Generation] = {}
        """Objects that the columns cannot hold, by row: links, and objects with a version id."""
        self._marks: list[bytes] = []
        """Every STEP-th name, to find the others by."""
        self._last = b""
        self._sorted = True

    # Filling

    async def add(self, page: Page) -> None:
        """Add a page; pages may come in any order."""
        start = len(self.prefix)
        await self.extend(
            [
                *((generation.key[start:], generation) for generation in page.objects),
                *((below[start:-1], NonObject.DIRECTORY) for below in page.prefixes),
                *((key[start:], NonObject.UNREADABLE) for key in page.unreadable),
                *((symlink.key[start:], symlink) for symlink in page.symlinks),
            ]
        )

    async def extend(self, named: Iterable[tuple[str, Entry]]) -> None:
        """Add entries by name."""
        left = iter(named)
        while rows := list(islice(left, SLICE)):
            self._extend(rows)
            if len(rows) == SLICE:
                await trio.lowlevel.checkpoint()

    def _extend(self, named: Sequence[tuple[str, Entry]]) -> None:
        rows = []
        for text, entry in named:
            try:
                name = os.fsencode(text)
            except UnicodeEncodeError:
                name = b""
            if possible(name) and (isinstance(entry, NonObject) or entry.plausible):
                rows.append((name, entry))
            else:
                self.hidden += 1
        for name, entry in sorted(rows, key=itemgetter(0)):
            self._append(name, entry)

    def _append(self, name: bytes, entry: Entry) -> None:
        self._sorted = self._sorted and name > self._last
        self._last = name
        self.names.append(name)
        if isinstance(entry, Generation):
            if entry.version_id is not None or entry.linked is not None:
                self._linked[len(self._kinds)] = entry
            self._kinds.append(0)
            self._etags.append(entry.etag.encode())
            self._sizes.append(entry.size)
            self._modified.append(moment(entry.modified_ns))
        else:
            self._kinds.append(_SYMLINK if isinstance(entry, Symlink) else _KINDS.index(entry))
            self._etags.append(os.fsencode(entry.target) if isinstance(entry, Symlink) else b"")
            self._sizes.append(0)
            self._modified.append(0)

    async def put_in_order(self) -> None:
        """Sort the rows by name, each name once. Of an object and a directory of one name, the directory wins."""
        self.names.rows = range(len(self._kinds)) if self._sorted else await self._sorted_rows()
        for place in range(0, len(self.names), STEP):
            self._marks.append(self.names[place])
            if len(self._marks) % SLICE == 0:
                await trio.lowlevel.checkpoint()

    async def _sorted_rows(self) -> "array[int]":
        name_of, count = self.names.row, len(self._kinds)
        # A sample sort: each part has about a slice of names, so the loop can pause between parts.
        bounds = list[bytes]()
        for first in range(0, count, SLICE):
            bounds.append(name_of(random.randrange(first, min(first + SLICE, count))))  # noqa: S311 a sample
            if len(bounds) % SLICE == 0:
                await trio.lowlevel.checkpoint()
        bounds.sort()
        parts = [array("I") for _ in range(len(bounds) + 1)]
        for first in range(0, count, SLICE):
            for row in range(first, min(first + SLICE, count)):
                parts[bisect_right(bounds, name_of(row))].append(row)
            await trio.lowlevel.checkpoint()
        order = array("I")
        for part in parts:
            for row in sorted(part, key=name_of):  # stable: the first of equal names wins
                if order and name_of(order[-1]) == name_of(row):
                    self._merge(order[-1], row)
                    continue
                order.append(row)
                if len(order) % SLICE == 0:
                    await trio.lowlevel.checkpoint()
        return order

    def _merge(self, kept: int, other: int) -> None:
        """Merge two rows of one name."""
        kinds, directory = {self._kinds[kept], self._kinds[other]}, _KINDS.index(NonObject.DIRECTORY)
        if directory in kinds and len(kinds) > 1:
            self.hidden += 1
            self._kinds[kept] = directory

    # Reading

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.names)

    def __getitem__(self, name: bytes) -> Entry:
        first = STEP * max(0, bisect_right(self._marks, name) - 1)
        rows = self.names.rows
        place = bisect_left(rows, name, first, min(first + STEP, len(rows)), key=self.names.row)
        if place == len(rows) or self.names.row(rows[place]) != name:
            raise KeyError(name)
        return self._entry(rows[place])

    def items(self) -> ItemsView[bytes, Entry]:
        return _Items(self)

    def items_from(self, start: int) -> Iterator[tuple[bytes, Entry]]:
        """The names and entries from a place on."""
        for place in range(start, len(self.names)):
            row = self.names.rows[place]
            yield self.names.row(row), self._entry(row)

    def _entry(self, row: int) -> Entry:
        key = self.prefix + os.fsdecode(self.names.row(row))
        if self._kinds[row] == _SYMLINK:
            return Symlink(key=key, target=os.fsdecode(self._etags.row(row)))
        kind = _KINDS[self._kinds[row]]
        if kind is not None:
            return kind
        return self._linked.get(row) or Generation(
            key=key,
            etag=self._etags.row(row).decode(),
            size=self._sizes[row],
            modified_ns=self._modified[row],
        )

    @property
    def links(self) -> list[Generation]:
        """The objects that are links to other files."""
        return [link for row, link in self._linked.items() if link.linked is not None and not self._kinds[row]]

    @property
    def size(self) -> int:
        """Bytes of memory, estimated."""
        return self.names.size + self._etags.size + 17 * len(self._kinds) + _WHOLE_SIZE * len(self._linked)

    def digest(self) -> bytes:
        """A hash of the content: equal for equal entries that came in the same pages."""
        digest = hashlib.blake2b(repr(sorted(self._linked.items())).encode(errors="surrogateescape"), digest_size=16)
        texts = (self.names.ends, self.names.data, self._etags.ends, self._etags.data)
        for column in (*texts, self._kinds, self._sizes, self._modified):
            digest.update(column)
        return digest.digest()

    async def shows_another(self, before: "Listing") -> bool:
        """Whether an object of the listing *before* has another content in this one."""
        later = 0
        for place, name in enumerate(before.names):
            if later < len(self.names) and self.names[later] != name:
                later = bisect_left(self.names, name, later)
            if later < len(self.names) and self.names[later] == name:
                was, now = before._etag(place), self._etag(later)
                if was and now and was != now:
                    return True
            if place % SLICE == SLICE - 1:
                await trio.lowlevel.checkpoint()
        return False

    def _etag(self, place: int) -> bytes:
        """The ETag of the object at a place; empty for anything else."""
        row = self.names.rows[place]
        return b"" if self._kinds[row] else self._etags.row(row)
