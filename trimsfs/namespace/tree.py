"""Names → inodes → generations: what the store holds, as a tree of directories that is read lazily."""

import contextlib
import enum
import hashlib
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import trio

from trimsfs.errors import (
    NoSuchEntryError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.handover.ledger import Ledger, Record, RecordKind
from trimsfs.namespace.directory import LONG_AGO, STALE_RETRY_S, Directory, Entry, NonObject, entries_of, possible
from trimsfs.stores.base import Store
from trimsfs.types import Generation

log = logging.getLogger(__name__)

ROOT_INODE = 1
NEGATIVE_TTL_S = 5.0
"""Longest that a name's absence is believed: a model that has just been uploaded should appear."""
REST_LIMIT = 100_000
"""Entries asked for at once after the first page; a store gives as many as it likes."""
PAGES_LIMIT, ENTRIES_LIMIT = 10_000, 1_000_000
"""A listing that has more has no end, for all that can be told: it is not waited for, nor kept in memory."""
KNOWN_NAMES = 10_000
"""Single names remembered in a directory that is too large to be listed for a lookup."""
_INODE_BITS = 62
PASSTHROUGH_BIT = 1 << _INODE_BITS
"""Set in the number by which a name leads to its object while its opens are passed through; programs never see it."""


class InodeKind(enum.Enum):
    """What an inode is."""

    DIRECTORY = "directory"
    OBJECT = "object"
    CONTROL_DIRECTORY = "control directory"
    CONTROL_FILE = "control file"


@dataclass(slots=True, eq=False)
class Inode:
    """A file or directory that the kernel may know.

    ``path`` is the object's key, or the directory's prefix with its closing slash (the root's is empty).
    Control inodes have the path of what they are about, and for a file the ``control`` name. ``lookups`` counts
    the kernel's references. ``replaced``: the store has shown another generation. An object has two inodes, told
    apart by PASSTHROUGH_BIT in the number: the kernel passes opens of the ``passthrough`` one to the local file, and
    the server answers reads of the other. ``slot`` is where the ledger has it, once the kernel has been told of it.
    """

    number: int
    kind: InodeKind
    path: str
    generation: Generation | None = None
    control: str = ""
    lookups: int = 0
    replaced: bool = False
    slot: int | None = None

    @property
    def passthrough(self) -> bool:
        return bool(self.number & PASSTHROUGH_BIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceStatistics:
    """``hidden_keys`` counts keys that cannot be file names, in the directories listed so far."""

    inodes: int
    directories: int
    hidden_keys: int


class Namespace:
    """The directories of a store. Names are believed for *ttl_s* seconds, absence for at most NEGATIVE_TTL_S.

    A name is absent only when the store has said so. When the store cannot be asked, what is known is served
    on; what is not known raises StoreUnavailableError.
    """

    def __init__(
        self, store: Store, *, ttl_s: float, impatient: Store | None = None, ledger: Ledger | None = None
    ) -> None:
        self._store = store
        self._ledger = ledger or Ledger()
        self._impatient = impatient or store
        self._down_until = LONG_AGO
        self._ttl_s = ttl_s
        self._negative_ttl_s = min(ttl_s, NEGATIVE_TTL_S)
        self._directories: dict[str, Directory] = {}
        self._root = Inode(ROOT_INODE, InodeKind.DIRECTORY, "", lookups=1)
        self._inodes = {ROOT_INODE: self._root}
        self._hidden: dict[str, int] = {}
        for record in self._ledger.taken(RecordKind.INODE):
            self._restore(record)

    def _restore(self, record: Record) -> None:
        """Take over an inode that the kernel was told of by an earlier server.

        Its name is known from it, not to be believed but for while the store cannot be asked.
        """
        inode = _unpacked(record)
        self._inodes[inode.number] = inode
        known = NonObject.DIRECTORY if inode.kind is InodeKind.DIRECTORY else inode.generation
        if known is not None and inode.kind in {InodeKind.DIRECTORY, InodeKind.OBJECT} and not inode.control:
            prefix, slash, name = inode.path.removesuffix("/").rpartition("/")
            names = self._directory(prefix + slash).names
            other, _ = names.get(os.fsencode(name), (known, 0.0))
            if (
                not isinstance(other, Generation)
                or not isinstance(known, Generation)
                or (known.modified_ns >= other.modified_ns)
            ):
                names[os.fsencode(name)] = known, LONG_AGO

    def statistics(self) -> NamespaceStatistics:
        return NamespaceStatistics(
            inodes=len(self._inodes),
            directories=len(self._directories),
            hidden_keys=sum(self._hidden.values()),
        )

    # Inodes

    def inode(self, number: int) -> Inode:
        """An inode that the kernel knows. Raises NoSuchEntryError for one it should not."""
        try:
            return self._inodes[number]
        except KeyError:
            raise NoSuchEntryError(f"inode {number} is not known") from None

    def numbers(self) -> list[int]:
        """The numbers of all inodes that the kernel may know."""
        return list(self._inodes)

    def known(self, number: int) -> Inode | None:
        """An inode by its number, if it is known."""
        return self._inodes.get(number)

    def reference(
        self,
        kind: InodeKind,
        path: str,
        generation: Generation | None = None,
        control: str = "",
        *,
        passthrough: bool = False,
    ) -> Inode:
        """The inode of a thing, its number a function of what it is; made when it is not known yet.

        The caller counts with `count_lookup` what it tells the kernel, and discards an inode that it does not tell.
        """
        if kind is InodeKind.DIRECTORY and not path:
            return self._root
        etag = generation.etag if generation is not None else ""
        for salt in range(len(self._inodes) + 1):
            number = _inode_number(kind, path, etag, control, salt) | (PASSTHROUGH_BIT if passthrough else 0)
            inode = self._inodes.get(number)
            if inode is None:
                inode = self._inodes[number] = Inode(number, kind, path, generation, control)
                return inode
            known = inode.generation.etag if inode.generation is not None else ""
            if (inode.kind, inode.path, known, inode.control) == (kind, path, etag, control):
                return inode
        raise AssertionError("unreachable: more salts than inodes were tried")

    def cached_number(self, generation: Generation) -> int | None:
        """The number by which the kernel may know an object that is served in cached mode; None if it does not."""
        inode = self.reference(InodeKind.OBJECT, generation.key, generation)
        self.discard(inode)
        return inode.number if inode.lookups else None

    def count_lookup(self, inode: Inode) -> None:
        """The kernel is about to get an inode once more."""
        inode.lookups += 1
        if inode.slot is not None:
            self._ledger.set(inode.slot, inode.lookups)
        elif inode is not self._root:
            inode.slot = self._ledger.add(RecordKind.INODE, inode.number, _packed(inode), count=inode.lookups)

    def forget(self, number: int, lookups: int) -> None:
        """The kernel gave up that many references to an inode."""
        inode = self._inodes.get(number)
        if inode is None or inode is self._root:
            return
        inode.lookups = max(inode.lookups - lookups, 0)
        if inode.slot is not None:
            self._ledger.set(inode.slot, inode.lookups)
        if inode.lookups == 0:
            del self._inodes[number]

    def discard(self, inode: Inode) -> None:
        """Drop an inode that turned out not to be told to the kernel."""
        if inode.lookups <= 0 and inode is not self._root:
            self._inodes.pop(inode.number, None)

    # Names

    async def lookup(self, prefix: str, name: bytes) -> tuple[Entry, float]:
        """What *name* is in the directory *prefix*, and for how many more seconds that is believed.

        ABSENT only when the store has said that there is no such name. Raises StoreError when it cannot be asked.
        """
        if not possible(name):
            return NonObject.ABSENT, self._negative_ttl_s
        directory = self._directory(prefix)
        answer = self._known(directory, name)
        if answer is None and not directory.large:
            async with directory.lock:
                answer = self._known(directory, name)
                if answer is None and not directory.large and not self._fresh(directory):
                    answer = await self._refreshed(directory, prefix, name)
        return answer or await self._ask(directory, prefix, name)

    async def _refreshed(self, directory: Directory, prefix: str, name: bytes) -> tuple[Entry, float] | None:
        """What can be said of a name after the directory has been listed, if one page holds it."""
        patient = not directory.complete and directory.stale(name) is NonObject.ABSENT
        try:
            await self._refresh(directory, prefix, whole=False, patient=patient)
        except StoreError:
            if (stale := directory.stale(name)) is NonObject.ABSENT:
                raise
            return stale, STALE_RETRY_S
        return self._known(directory, name)

    async def entries(self, prefix: str) -> dict[bytes, Entry]:
        """All entries of a directory by name; the caller must not change them.

        Raises StoreError when the directory is not known and the store cannot be asked.
        """
        directory = self._directory(prefix)
        if not self._fresh(directory):
            async with directory.lock:
                if not self._fresh(directory):
                    await self._refresh(directory, prefix, whole=True, patient=not directory.complete)
        return directory.entries

    def known_entries(self, prefix: str) -> dict[bytes, Entry]:
        """The entries of a directory as it was last listed, in order of name; none when it was not."""
        directory = self._directories.get(prefix)
        return directory.entries if directory is not None else {}

    def replaced(self, key: str) -> None:
        """The object is not what the directory says, as the store has just told: ask it at the next lookup."""
        directory = self._directories.get(key[: key.rfind("/") + 1])
        self._down_until = LONG_AGO
        if directory is not None:
            directory.listed = directory.retry_at = LONG_AGO
            directory.names.clear()
            directory.distrusted = trio.current_time()
            self.doubt(key)

    def doubt(self, key: str) -> None:
        """The object may not be what the directory says: ask the store for it at the next lookup."""
        prefix, slash, name = key.rpartition("/")
        directory = self._directories.get(prefix + slash)
        if directory is not None:
            directory.outdated[os.fsencode(name)] = trio.current_time()

    def _directory(self, prefix: str) -> Directory:
        directory = self._directories.get(prefix)
        if directory is None:
            directory = self._directories[prefix] = Directory()
        return directory

    def _fresh(self, directory: Directory) -> bool:
        """Whether the listing may be used: it is young, or the store has just failed to give another."""
        now = trio.current_time()
        usable_until = max(directory.listed + self._ttl_s, directory.retry_at, self._down_until)
        return directory.complete and now < usable_until

    def _known(self, directory: Directory, name: bytes) -> tuple[Entry, float] | None:
        """What can be said of a name without asking the store, and how long it holds; None when it must be asked."""
        now = trio.current_time()
        if directory.doubts(name):
            return None
        if name in directory.names:
            entry, told = directory.names[name]
            left = told + self._ttl(entry) - now
            if left > 0:
                return entry, left
        entry = directory.entries.get(name, NonObject.ABSENT)
        left = directory.listed + self._ttl(entry) - now
        if entry is not NonObject.ABSENT:
            left = max(left, directory.retry_at - now, self._down_until - now)
        return (entry, left) if directory.complete and left > 0 else None

    def _ttl(self, entry: Entry) -> float:
        return self._negative_ttl_s if entry is NonObject.ABSENT else self._ttl_s

    async def _ask(self, directory: Directory, prefix: str, name: bytes) -> tuple[Entry, float]:
        """Ask the store for one name; when it cannot be asked, an answer that has expired will do."""
        asked, stale = trio.current_time(), directory.stale(name)
        known = stale is not NonObject.ABSENT and not directory.doubts(name)
        if known and asked < directory.retry_at:
            return stale, STALE_RETRY_S
        try:
            directory.raise_recent_failure()
            entry = await self._probe(prefix + os.fsdecode(name), patient=not known)
        except StoreError as error:
            if not isinstance(error, StoreAccessError):  # which may be about this object alone
                directory.failed(error)
            if (stale := directory.stale(name)) is NonObject.ABSENT:
                raise
            return stale, STALE_RETRY_S
        if asked > max(directory.distrusted, directory.outdated.get(name, LONG_AGO)):
            directory.names[name] = entry, asked
            directory.names.move_to_end(name)
        while len(directory.names) > KNOWN_NAMES:
            directory.names.popitem(last=False)
        return entry, self._ttl(entry)

    async def _refresh(self, directory: Directory, prefix: str, *, whole: bool, patient: bool) -> None:
        """List a directory anew: all of it, or only if one page holds it; unless *patient* the store is asked once."""
        asked = trio.current_time()
        try:
            directory.raise_recent_failure()
            store = self._store if patient else self._impatient
            pages = [await store.list_page(prefix)]
            entries = len(pages[0])
            while whole and (token := pages[-1].next_token) is not None:
                if entries > ENTRIES_LIMIT or len(pages) > PAGES_LIMIT:
                    break
                pages.append(await store.list_page(prefix, token=token, limit=REST_LIMIT))
                entries += len(pages[-1])
        except StoreError as error:
            if not directory.complete:
                directory.failed(error)
                raise
            log.warning("serving /%s as it was listed before: %s", prefix, error)
            directory.failed(error)
            if isinstance(error, StoreUnavailableError | TransientStoreError):
                # Not only this directory: a path is looked up level by level.
                self._down_until = trio.current_time() + STALE_RETRY_S
            return
        directory.large = pages[-1].next_token is not None
        if whole and directory.large:
            raise StoreUnavailableError(f"/{prefix}: more than {entries} names: too many to list")
        if not directory.large:
            directory.entries, self._hidden[prefix] = entries_of(prefix, pages)
            directory.listed = asked if asked > directory.distrusted else LONG_AGO
            directory.outdated = {name: since for name, since in directory.outdated.items() if since >= asked}
            directory.complete = True
            directory.names.clear()

    async def _probe(self, path: str, *, patient: bool) -> Entry:
        """Ask for an object, and whether there is anything below its name. A directory wins."""
        store, found, failed = self._store if patient else self._impatient, list[Generation](), list[StoreError]()
        async with trio.open_nursery() as nursery:

            @contextlib.contextmanager
            def failing() -> Iterator[None]:
                """A group of errors could have a cancellation among them: they are told without one."""
                try:
                    yield
                except StoreError as error:
                    failed.append(error)
                    nursery.cancel_scope.cancel()

            async def stat() -> None:
                with failing(), contextlib.suppress(ObjectNotFoundError):
                    generation = await store.stat(path)
                    if generation.plausible:
                        found.append(generation)

            nursery.start_soon(stat)
            with failing():
                below = await store.list_page(f"{path}/", limit=1)
        if failed:
            raise failed[0]
        if below.exists:
            return NonObject.DIRECTORY
        return found[0] if found else NonObject.ABSENT


def _packed(inode: Inode) -> bytes:
    """An inode for the ledger."""
    generation = inode.generation
    content = None
    if generation is not None:
        content = (generation.key, generation.etag, generation.size, generation.modified_ns, generation.version_id)
    return json.dumps((inode.kind.value, inode.path, inode.control, content)).encode()


def _unpacked(record: Record) -> Inode:
    kind, path, control, content = json.loads(record.content)
    generation = None
    if content is not None:
        key, etag, size, modified_ns, version_id = content
        generation = Generation(key=key, etag=etag, size=size, modified_ns=modified_ns, version_id=version_id)
    return Inode(record.number, InodeKind(kind), path, generation, control, lookups=record.count, slot=record.slot)


def _inode_number(kind: InodeKind, path: str, etag: str, control: str, salt: int) -> int:
    identity = "\0".join((kind.value, path, etag, control, str(salt)))
    digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=8).digest()
    number = int.from_bytes(digest) & ((1 << _INODE_BITS) - 1)
    return number if number > ROOT_INODE else number + 2
