"""Handles of open control files."""

import json
from collections.abc import Iterator
from typing import Protocol, runtime_checkable


class ControlHandle(Protocol):
    """An open control file."""

    async def read(self, offset: int, size: int) -> bytes:
        """At most *size* bytes from *offset* on; none at the end."""

    def close(self) -> None:
        """Handle the close of the file."""


@runtime_checkable
class Recorded(ControlHandle, Protocol):
    """An open control file that is recorded for the next server."""

    def record(self, handle: int) -> None:
        """Record the handle by which it is open."""


class Text:
    """An open control file whose content was made by the open; *keep* lives as long as it is open."""

    def __init__(self, content: bytes, keep: object = None) -> None:
        self._content = content
        self._keep = keep

    async def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]

    def close(self) -> None:
        """Do nothing: the content is complete."""


class Lines:
    """A control file of lines of JSON, each made when a read comes to it: a read gives one, so that none takes long."""

    def __init__(self, values: Iterator[object]) -> None:
        self._values = values
        self._text = b""

    async def read(self, offset: int, size: int) -> bytes:
        if len(self._text) <= offset:
            self._text += next(map(as_json, self._values), b"")
        return self._text[offset : offset + size]

    def close(self) -> None:
        """Nothing goes on."""


def as_json(value: object) -> bytes:
    """A line of JSON for a control file."""
    return json.dumps(value).encode() + b"\n"
