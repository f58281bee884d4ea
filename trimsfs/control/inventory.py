"""Inventory: a control file that lists all files below a directory, and what of each is cached."""

import os
from collections.abc import Awaitable, Callable, Iterator, Mapping
from itertools import islice

import trio

from trimsfs.control.handle import as_json
from trimsfs.errors import InvalidRequestError, StoreAccessError
from trimsfs.namespace.listing import SLICE, Entry, NonObject
from trimsfs.types import Generation, Symlink


class Inventory:
    """Lines of JSON, at least one per directory: ``path``, ``files`` with their sizes, and what is cached, ``here``.

    A line has at most SLICE files. Reads make the lines from listings: no name needs an inode. *here* returns what is
    cached of a file. Directories that are not *listable* are left out; of one that the store refuses to list, the line
    has the reason, ``refused``.
    """

    def __init__(
        self,
        path: str,
        entries: Callable[[str], Awaitable[Mapping[bytes, Entry]]],
        here: Callable[[Generation], dict[str, object] | None],
        listable: Callable[[str], bool],
    ) -> None:
        self._path = path
        self._entries = entries
        self._here = here
        self._listable = listable
        self._prefix = ""
        self._names: Iterator[tuple[bytes, Entry]] | None = None
        self._refused: str | None = None
        self._prefixes = [path]
        self._text = b""
        self._start = 0
        self._reading = trio.Lock()

    async def read(self, offset: int, size: int) -> bytes:
        async with self._reading:
            if offset < self._start:
                raise InvalidRequestError("this file is made as it is read: read it once, from start to end")
            self._text, self._start = self._text[offset - self._start :], offset
            if not self._text and (self._names is not None or self._prefixes):
                self._text = await self._line()
            return self._text[:size]

    def close(self) -> None:
        """Do nothing: only reads make lines."""

    async def _listed(self, prefix: str) -> Iterator[tuple[bytes, Entry]]:
        try:
            return iter((await self._entries(prefix)).items())
        except StoreAccessError as error:
            if prefix == self._path:
                raise
            self._refused = str(error)
            return iter(())

    async def _line(self) -> bytes:
        if self._names is None:
            self._names = await self._listed(self._prefixes[-1])  # if interrupted here, a read changes nothing
            self._prefix = self._prefixes.pop()
        files, here = dict[str, int](), dict[str, object]()
        names = list(islice(self._names, SLICE))
        if len(names) < SLICE:
            self._names = None
        for encoded, entry in names:
            name = os.fsdecode(encoded)
            if isinstance(entry, Generation):
                files[name] = entry.size
                facts = self._here(entry)
                if facts is not None:
                    here[name] = facts
            elif isinstance(entry, Symlink):
                continue  # counted where it leads to
            elif entry is not NonObject.DIRECTORY:
                files[name] = 0  # the store refuses to describe it
            elif self._listable(below := f"{self._prefix}{name}/"):
                self._prefixes.append(below)
        refused, self._refused = self._refused, None
        record: dict[str, object] = {"path": self._prefix, "files": files, "here": here}
        return as_json(record if refused is None else record | {"refused": refused})
