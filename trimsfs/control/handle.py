"""What an open control file can do: be read, and be closed."""

import json
from typing import Protocol


class ControlHandle(Protocol):
    """An open control file."""

    async def read(self, offset: int, size: int) -> bytes:
        """At most *size* bytes from *offset* on; none at the end."""

    def close(self) -> None:
        """The caller has closed the file."""


class Text:
    """A control file whose content is made when it is opened."""

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def read(self, offset: int, size: int) -> bytes:
        return self._content[offset : offset + size]

    def close(self) -> None:
        """Nothing goes on."""


def as_json(value: object) -> bytes:
    """A line of a control file."""
    return json.dumps(value).encode() + b"\n"
