"""The protocol of a store: list, stat, read and digest objects."""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from trimsfs.errors import ObjectNotFoundError
from trimsfs.stores.digests import Digest
from trimsfs.types import Buffer, Generation, Symlink

PAGE_LIMIT = 1000
"""Most entries in one page of a listing, as in S3."""
MOST_NAMELESS = 100
"""Pages without a name in a row after which a listing does not get on. Services may send some."""

_LATEST_NS = (1 << 63) - 1

Sink = Callable[[Buffer], None]
"""Takes the bytes read, piece by piece, in the reading thread. It must not keep a piece after the call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Part of a listing: the objects directly under a prefix and the prefixes one level below it.

    Keys and prefixes are whole; prefixes end in ``/``. ``next_token`` requests the next page; None means this is the
    last. ``empty`` says that the directory exists though the page has no name. ``unreadable`` has keys that exist, but
    whose type trimsfs lacks the permission to learn. ``symlinks`` are shown in the mount as such. ``symlink`` says that
    the prefix is no directory but one of those, with its closing slash.
    """

    objects: tuple[Generation, ...]
    prefixes: tuple[str, ...]
    next_token: str | None
    empty: bool = False
    unreadable: tuple[str, ...] = ()
    symlinks: tuple[Symlink, ...] = ()
    symlink: Symlink | None = None

    def __len__(self) -> int:
        """The number of names in the page."""
        return len(self.objects) + len(self.prefixes) + len(self.unreadable) + len(self.symlinks)

    @property
    def exists(self) -> bool:
        """Whether the directory exists."""
        return self.empty or len(self) > 0


class Paging:
    """Watches whether a listing gets on: each page has a token of its own, and names that no earlier page had."""

    def __init__(self) -> None:
        self.pages = self.names = 0
        self._nameless = 0
        self._seen = set[int]()

    def problem(self, page: Page) -> str | None:
        """Why the listing does not get on with this page, its next one; None if it does."""
        self.pages += 1
        self.names += len(page)
        self._nameless = 0 if len(page) else self._nameless + 1
        if self._nameless > MOST_NAMELESS:
            return f"{self._nameless} pages in a row have no name"
        first = (page.objects[:1], page.prefixes[:1], page.unreadable[:1])
        marks = {hash(first)} if any(first) else set[int]()
        marks |= set() if page.next_token is None else {hash(page.next_token)}
        if marks & self._seen:
            return f"page {self.pages} repeats an earlier one"
        self._seen |= marks
        return None


def moment(nanoseconds: int) -> int:
    """A time since the epoch, clamped to 64 bits: in some stores, writers set any time they like."""
    return max(-_LATEST_NS, min(nanoseconds, _LATEST_NS))


def absent(error: Exception) -> bool:
    """Whether an error means that the file does not exist."""
    numbers = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO}
    return isinstance(error, ObjectNotFoundError) or (isinstance(error, OSError) and error.errno in numbers)


class Store(Protocol):
    """The origin of models. Every method may take as long as a network does.

    Any method may raise TransientStoreError, StoreUnavailableError or StoreAccessError besides the errors it names.
    Keys are relative to the store's own prefix.
    """

    @property
    def identity(self) -> str:
        """The store's name in the cache: equal for mounts that see the same objects under the same keys."""

    @property
    def streaming(self) -> bool:
        """Whether bytes from `read` are valid as they arrive, not only once the whole read has succeeded."""

    @property
    def forkable(self) -> bool:
        """Whether an unused store also works in a forked process."""

    @property
    def links(self) -> bool:
        """Whether a name may be a link to another file."""

    async def probe(self) -> None:
        """Check that the store answers, exists and can be listed.

        Raises BucketNotFoundError when the bucket or directory does not exist.
        """

    async def list_page(self, prefix: str, *, token: str | None = None, limit: int = PAGE_LIMIT) -> Page:
        """One page of the directory *prefix* (empty, or ending in ``/``), at most *limit* entries.

        A prefix without objects gives an empty page. Raises BucketNotFoundError as `probe` does.
        """

    async def stat(self, key: str) -> Generation:
        """The newest generation of an object. Raises ObjectNotFoundError."""

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        """Pass *length* bytes of the generation from *offset* on to *sink*; the range lies inside the object.

        Returns the version id of these bytes if the store keeps versions. Raises ObjectChangedError when the store no
        longer has this generation, ObjectNotFoundError when it has none, and any StoreError that *sink* raises.
        """

    async def digest(self, generation: Generation, *, certain: bool = False) -> Digest | None:
        """The store's digest of all bytes of the generation; None if it has none.

        Unless *certain*, a value that most likely is the digest will do. Raises as `read` does.
        """

    async def aclose(self) -> None:
        """Release connections and threads."""


class Head(NamedTuple):
    """The first bytes of an object, and what it is: its ETag, None if the store tells none, and its size."""

    etag: str | None
    size: int
    data: Buffer


@runtime_checkable
class Peekable(Protocol):
    """A store that gives the first bytes of what may be an object, before anything is known of it."""

    async def peek(self, key: str, length: int) -> Head:
        """At most *length* first bytes of an object that has any. Raises ObjectNotFoundError."""


class StoreWrapper:
    """Another *store*, of which a subclass changes a part."""

    def __init__(self, store: Store) -> None:
        self.store = store

    @property
    def identity(self) -> str:
        return self.store.identity

    @property
    def streaming(self) -> bool:
        return self.store.streaming

    @property
    def forkable(self) -> bool:
        return self.store.forkable

    @property
    def links(self) -> bool:
        return self.store.links

    async def probe(self) -> None:
        await self.store.probe()

    async def read(self, generation: Generation, offset: int, length: int, sink: Sink) -> str | None:
        return await self.store.read(generation, offset, length, sink)

    async def aclose(self) -> None:
        await self.store.aclose()
