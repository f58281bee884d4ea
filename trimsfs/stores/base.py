"""The protocol of a store: list, stat, read and digest objects."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from trimsfs.errors import ObjectNotFoundError
from trimsfs.stores.digests import Digest
from trimsfs.types import Buffer, Generation

PAGE_LIMIT = 1000
"""Most entries in one page of a listing, as in S3."""

_LATEST_NS = (1 << 63) - 1

Sink = Callable[[Buffer], None]
"""Takes the bytes that are read, piece after piece, in the thread that reads. It keeps no piece after the call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Part of a listing: the objects directly under a prefix and the prefixes one level below it.

    Keys and prefixes are whole, prefixes end in ``/``. ``next_token`` asks for the page that follows; None
    after the last one. ``empty`` tells that the directory exists though the page names nothing in it. ``unreadable``
    are the keys of which the store may not tell what they are.
    """

    objects: tuple[Generation, ...]
    prefixes: tuple[str, ...]
    next_token: str | None
    empty: bool = False
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many names it has."""
        return len(self.objects) + len(self.prefixes) + len(self.unreadable)

    @property
    def exists(self) -> bool:
        """Whether there is such a directory."""
        return self.empty or len(self) > 0


def moment(nanoseconds: int) -> int:
    """A time since the epoch, cut to 64 bits: writers choose the times of objects freely in some stores."""
    return max(-_LATEST_NS, min(nanoseconds, _LATEST_NS))


def absent(error: Exception) -> bool:
    """Whether an error of a file system says that there is no such file."""
    numbers = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO}
    return isinstance(error, ObjectNotFoundError) or (isinstance(error, OSError) and error.errno in numbers)


class Store(Protocol):
    """Where models come from. Every method may block for as long as a network does.

    Any method may raise TransientStoreError, StoreUnavailableError or StoreAccessError besides those it names.
    Keys are relative to the store's own prefix.
    """

    @property
    def identity(self) -> str:
        """Names the store in the cache: equal for mounts that see the same objects under the same keys."""

    @property
    def streaming(self) -> bool:
        """Whether bytes that `read` passes on are right at once, or only when the whole read has succeeded."""

    @property
    def forkable(self) -> bool:
        """Whether the store, not used so far, works in a forked process as well."""

    @property
    def links(self) -> bool:
        """Whether a name may be a link to the file of another one."""

    async def probe(self) -> None:
        """Check that the store answers, exists and can be listed.

        Raises BucketNotFoundError when there is no such bucket or directory.
        """

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        """One page of the directory *prefix* (empty, or ending in ``/``), at most *limit* entries.

        A prefix under which nothing exists gives an empty page. Raises BucketNotFoundError as `probe` does.
        """

    async def stat(self, key: str) -> Generation:
        """The newest generation of an object. Raises ObjectNotFoundError."""

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        """Pass *length* bytes of the generation from *offset* on to *sink*; the range lies inside the object.

        Returns the version id that the store gave for these bytes, if it keeps versions. Raises
        ObjectChangedError when the store no longer has this generation, ObjectNotFoundError when it has none, and
        any StoreError that *sink* raises.
        """

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        """The store's digest of all bytes of the generation; None when it has none.

        Unless it must be *certain*, what is most likely one will do. Raises as `read` does.
        """

    async def aclose(self) -> None:
        """Release connections and threads."""
