"""Extras in a server: what each may add to the control files, the commands, the ioctls and the life of a file."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from trimsfs.control.authorisation import Caller
from trimsfs.control.handle import ControlHandle
from trimsfs.control.jobs import Order
from trimsfs.control.metrics import Source
from trimsfs.control.progress import Progress
from trimsfs.tiers.blob import Blob
from trimsfs.types import Generation

Service = Callable[..., Awaitable[Any]]
"""Runs until the server stops, and reports when it has started."""
Command = Callable[[Generation, Progress], Awaitable[None]]
"""Carries out a command on one file. Raises TrimsError."""
Admitted = Callable[[Generation, Progress], AbstractAsyncContextManager[Blob]]
"""A block with the blob of a file that programs may open, while a command brings it into a tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IoctlRequest:
    """An ioctl with ``data``, by a user and thread, of a file that is open by ``handle``.

    ``derived`` tells whether the file is a derived blob instead of a model's file.
    """

    handle: int
    generation: Generation
    derived: bool
    uid: int
    pid: int
    data: bytes


Ioctl = Callable[[IoctlRequest], Awaitable[bytes]]
"""Answers an ioctl. Raises TrimsError."""


class Extra:
    """An extra of a server. Each method adds nothing, unless an extra overrides it."""

    services: Sequence[Service] = ()
    """They start before the server answers its first request."""
    sources: Mapping[str, Source] = {}
    """The functions that return statistics, by the first word of their metrics' names."""
    switches: Mapping[str, Callable[[], None]] = {}
    """Control files of the root that change how the server works."""
    ioctls: Mapping[int, Ioctl] = {}
    """Ioctls of open files, by the number of ``trimsfs.h``."""
    directory = ""
    """The name of a control directory of each model file, and of a control file of the root; empty if there is none."""

    def facts(self) -> Mapping[str, object]:
        """What the control file ``control`` tells of it."""
        return {}

    # The control directory

    def names(self) -> list[str]:
        """The names in the control directory. Without any, the directory is not listed."""
        return []

    def knows(self, name: str) -> bool:
        """Whether a control file in the directory may have this name."""
        return False

    async def open(self, generation: Generation, name: str, caller: Caller) -> ControlHandle:
        """Open a control file in the directory."""
        raise NotImplementedError

    def restored(self, handle: int, name: str) -> ControlHandle | None:
        """A control file in the directory that an earlier server opened; None if it cannot go on."""
        return None

    def report(self, may_tell: Callable[[Generation], bool], uid: int | None) -> Mapping[str, object]:
        """The content of the root's control file: of files for which *may_tell* is true. For a user, only what concerns
        this one; for None, all."""
        raise NotImplementedError

    async def find(self, model: Generation, name: str) -> Generation | None:
        """The file of this name among the control files of a model's file; None if it is none of this extra."""
        return None

    def xattr(self, generation: Generation, name: str, caller: Callable[[], Caller]) -> bytes | None:
        """The value of an attribute, named without its prefix; None if it is none of this extra."""
        return None

    def shows_content(self, name: str) -> bool:
        """Whether a control file or attribute reveals some of its file's content."""
        return False

    # Commands

    def command_names(self) -> list[str]:
        """The names of the commands that it adds."""
        return []

    def knows_command(self, name: str) -> bool:
        """Whether a command may have this name."""
        return name in self.command_names()

    def command(self, order: Order, admitted: Admitted) -> Command | None:
        """What carries out an order; None if it is none of this extra."""
        return None

    # The life of a file

    def resident(self, generation: Generation) -> Mapping[str, object]:
        """What it adds to the bytes of a generation in each tier."""
        return {}

    def generations(self) -> Mapping[str, Generation]:
        """The generations of which it has bytes, by token."""
        return {}

    def check_idle(self, generation: Generation) -> None:
        """Raise InUseError if a file must not be evicted now."""

    async def evicted(self, generation: Generation) -> None:
        """Remove what it has of a file that is evicted. Raises InUseError."""

    async def repaired(self, generation: Generation) -> None:
        """Check what it has of a file whose bytes were wrong."""

    def closed(self, handle: int) -> None:
        """End what a program began through an open file."""

    def restore_file(self, handle: int) -> None:
        """Take over what a program began through a file that an earlier server opened."""

    def all_restored(self) -> None:
        """End what belongs to files that are no longer open, after the takeover of all others."""
