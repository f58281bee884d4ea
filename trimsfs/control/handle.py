"""What an open control file can do: be read, and be closed."""

from typing import Protocol


class ControlHandle(Protocol):
    """An open control file."""

    async def read(self, offset: int, size: int) -> bytes:
        """At most *size* bytes from *offset* on; none at the end."""

    def close(self) -> None:
        """The caller has closed the file."""
