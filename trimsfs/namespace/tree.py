"""The tree of names: the directories of a store, listed lazily. Cached names also serve while the store is down."""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from trimsfs.errors import StoreAccessError, StoreError, StoreUnavailableError
from trimsfs.handover.ledger import Ledger
from trimsfs.namespace.directory import LEAST_ASKED, LONG_AGO, STALE_RETRY_S, Directory
from trimsfs.namespace.inodes import IN_THE_STORE, Inode, InodeKind, Inodes, is_below
from trimsfs.namespace.inquiries import PAGES_LIMIT, Inquiries
from trimsfs.namespace.kept_listings import KeptListings
from trimsfs.namespace.known_directories import Directories
from trimsfs.namespace.lifetimes import ABSENT_AFTER_S, Lifetimes
from trimsfs.namespace.listing import Entry, Listing, NonObject, possible
from trimsfs.origins import ByPath, Origins, by_path
from trimsfs.stores.base import Store
from trimsfs.stores.circuit_breaker import CircuitBreaker
from trimsfs.types import Generation, Symlink

log = logging.getLogger(__name__)

LISTED_TTL_S = 1.0
"""How long a listing must still be valid to be given again, for programs that stat what they list."""
STALE_FOR_S, RETRY_DEADLINE_S = 86_400.0, 15.0
"""The defaults of the options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceStatistics:
    """``hidden_keys`` counts keys that cannot be file names, in the listings in memory."""

    inodes: int
    directories: int
    hidden_keys: int


class Namespace:
    """The directories of a store, and the inodes. Names are cached for *ttl_s* seconds, absence for at most
    NEGATIVE_TTL_S.

    While the store fails, expired answers serve for at most *stale_for_s* seconds. That a name exists serves at once;
    that it is absent, by a whole listing or an answer for the name, after ABSENT_AFTER_S. An unknown name raises
    StoreUnavailableError. *impatient* is the same store without retries, for requests that an expired answer can
    replace. *kept* has listings of earlier servers. *invalidate* gets a directory's inode number and a name that the
    kernel should look up again; it must not block. *replaced* gets a directory's prefix when the server finds that an
    object in it was replaced. *unlisted* gets the path of a still unknown name for which the server is to list a
    directory.
    """

    def __init__(
        self,
        store: Store,
        *,
        ttl_s: float,
        stale_for_s: float = STALE_FOR_S,
        impatient: Store | None = None,
        breaker: CircuitBreaker | ByPath[CircuitBreaker] | None = None,
        kept: KeptListings | None = None,
        ledger: Ledger | None = None,
        origins: Origins | None = None,
        invalidate: Callable[[int, bytes], None] = lambda *_: None,
        replaced: Callable[[str], None] = lambda _: None,
        unlisted: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._store = store
        breakers = by_path(breaker or CircuitBreaker(deadline_s=RETRY_DEADLINE_S))
        self._inquiries = breakers.map(lambda breaker: Inquiries(store, impatient or store, breaker))
        self._kept = kept
        self._lifetimes = Lifetimes(ttl_s, stale_for_s)
        self._invalidate = invalidate
        self._replaced = replaced
        self._unlisted = unlisted
        self._directories = Directories(breakers)
        self.inodes = Inodes(ledger or Ledger(), origins)
        for inode in self.inodes:
            self._restore(inode)

    def _restore(self, inode: Inode) -> None:
        """Take over the name of an inode that the kernel got from an earlier server."""
        known: Entry | None = NonObject.DIRECTORY if inode.kind is InodeKind.DIRECTORY else inode.generation
        if inode.kind is InodeKind.SYMLINK:
            known = Symlink(key=inode.path, target=inode.target)
        if inode.path and known is not None and inode.kind in IN_THE_STORE and not inode.control:
            prefix, slash, name = inode.path.removesuffix("/").rpartition("/")
            self._directory(prefix + slash).restore(os.fsencode(name), known)

    def statistics(self) -> NamespaceStatistics:
        return NamespaceStatistics(
            inodes=len(self.inodes),
            directories=len(self._directories),
            hidden_keys=sum(directory.entries.hidden for _, directory in self._directories),
        )

    # Names

    async def lookup(self, prefix: str, name: bytes) -> tuple[Entry, float]:
        """What *name* is in the directory *prefix*, and for how many more seconds that may be cached.

        Raises StoreError when the request fails and no earlier answer serves.
        """
        if not possible(name):
            return NonObject.ABSENT, self._lifetimes.absent_s
        directory = self._directory(prefix)
        answer = self._lifetimes.known(directory, name)
        if answer is None and not directory.large:
            async with directory.turn() as its_turn:
                answer = self._lifetimes.known(directory, name)
                if its_turn and answer is None and not directory.large and not self._lifetimes.usable(directory):
                    answer = await self._refreshed(directory, prefix, name, most=1)
        return answer or await self._ask(directory, prefix, name)

    def known(self, prefix: str, name: bytes) -> tuple[Entry, float] | None:
        """`lookup` without a request to the store; None if that gives no answer."""
        return self._lifetimes.known(self._directory(prefix), name) if possible(name) else None

    def latest(self, prefix: str, name: bytes) -> Entry | None:
        """What a name is by the last answer, however old; None if there is none."""
        return self._directory(prefix).latest(name)[0] if possible(name) else None

    async def recent(self, prefix: str, name: bytes, age_s: float) -> Entry:
        """What a name is, by an answer of at most *age_s* seconds; by the last one while the store does not answer.

        Raises StoreError as `lookup`.
        """
        directory = self._directory(prefix)
        async with directory.rechecking:  # so that those who ask at once share an answer
            entry, asked = directory.latest(name)
            now = trio.current_time()
            if entry is not None and now - asked <= age_s and asked > directory.distrusted:
                return entry
            if possible(name) and not directory.breaker.failing and now >= directory.retry_at:
                try:
                    entry = await self._inquiries.of(prefix).probe(prefix + os.fsdecode(name), patient=False)
                except StoreError as error:
                    if not isinstance(error, StoreAccessError):
                        directory.failed(error)
                else:
                    if directory.answered(name, entry, now):
                        self._forget_siblings(prefix)
                    return entry
        return (await self.lookup(prefix, name))[0]

    async def _refreshed(self, directory: Directory, prefix: str, name: bytes, most: int) -> tuple[Entry, float] | None:
        """List a directory of at most *most* pages. Returns what is then known of a name. Raises StoreError."""
        await self._recall(directory, prefix)
        if not directory.complete and not directory.large and directory.recent_failure is None:
            self._unlisted(prefix + os.fsdecode(name))
        patient = not directory.complete and not self._exists(directory.stale(name, self._lifetimes.oldest()))
        try:
            await self._refresh(directory, prefix, most=most, patient=patient)
        except StoreError:
            answer = self._lifetimes.known(directory, name)
            if answer is None and not directory.complete:
                raise
            return answer
        return self._lifetimes.known(directory, name)

    async def entries(self, prefix: str) -> Listing:
        """All entries of a directory by name.

        Raises StoreError when the request fails and no earlier listing serves.
        """
        directory, spare_s = self._directory(prefix), min(LISTED_TTL_S, self._lifetimes.ttl_s / 2)
        if not self._lifetimes.usable(directory, spare_s, listed_ahead=False):
            async with directory.lock:
                if not self._lifetimes.usable(directory, spare_s, listed_ahead=False):
                    await self._recall(directory, prefix)
                    held = directory.complete and directory.listed >= self._lifetimes.oldest()
                    try:
                        await self._refresh(directory, prefix, most=PAGES_LIMIT, patient=not held)
                    except StoreError:
                        if not held:
                            raise
        return directory.entries

    async def look_ahead(self, prefix: str) -> None:
        """List a directory of one page before a program looks up a name there. Raises StoreError."""
        directory = self._directory(prefix)
        async with directory.turn() as its_turn:
            if its_turn and not directory.large and not self._lifetimes.usable(directory):
                await self._refresh(directory, prefix, most=1, patient=not directory.complete)
                directory.ahead = True

    async def recall_root(self, path: str = "") -> bool:
        """Whether an earlier server listed the root of a store recently enough: then a mount works without the store.

        Of several stores, it is the one at a *path*.
        """
        directory = self._directory(path)
        await self._recall(directory, path)
        return directory.complete and directory.listed >= self._lifetimes.oldest()

    def is_empty(self, path: str = "") -> bool:
        """Whether the last listing of the root of a store, at a *path* if there are several, has no name."""
        directory = self._directories.get(path)
        return directory is not None and directory.complete and not directory.entries

    async def _recall(self, directory: Directory, prefix: str) -> None:
        """Load an earlier server's listing, once, in case the store does not give another."""
        if self._kept is None or directory.complete or directory.recalled:
            return
        directory.recalled = True
        kept = await self._kept.last(prefix)
        if kept is not None:
            entries, age_s = kept
            directory.recall(entries, trio.current_time() - age_s)
            self._directories.weigh(prefix)

    def believed(self, prefix: str, listing: Listing) -> Callable[[bytes], float]:
        """A function that tells for how many more seconds a name of a listing may be cached."""
        directory = self._directories.get(prefix)
        if directory is None or directory.entries is not listing:
            return lambda _: 0.0
        left = 0.0 if directory.expired else max(0.0, directory.listed + self._lifetimes.ttl_s - trio.current_time())
        return lambda name: 0.0 if name in directory.outdated or name in directory.names else left

    def known_entries(self, prefix: str) -> Listing:
        """The last listing of a directory; empty if there is none. Sends no request."""
        directory = self._directories.get(prefix)
        return directory.entries if directory is not None else Listing(prefix)

    @property
    def has_links(self) -> bool:
        """Whether names of this store may be links to other files."""
        return self._store.links

    def links(self) -> Iterator[Generation]:
        """The links in the known listings."""
        if not self.has_links:
            return iter(())
        return (link for _, directory in self._directories for link in directory.entries.links)

    def replaced(self, generation: Generation) -> None:
        """Record that the store has another generation of an object: the next lookup in its directory asks again."""
        prefix = generation.key[: generation.key.rfind("/") + 1]
        directory = self._directory(prefix)  # if forgotten, made anew: the kernel may still know its names
        if not directory.has_replaced(generation):
            directory.distrust(trio.current_time())
            self.mark_outdated(generation.key)
            self._forget_siblings(prefix)

    def is_replaced(self, generation: Generation) -> bool:
        """Whether another generation of an object is already known. Sends no request."""
        directory = self._directories.get(generation.key[: generation.key.rfind("/") + 1])
        return directory is not None and directory.has_replaced(generation)

    def _forget_siblings(self, prefix: str) -> None:
        """Make the kernel look up all files of a directory again, as one of them was replaced.

        Programs that start from now on then get files of one version.
        """
        for directory, name in self.inodes.known_names(prefix, {InodeKind.OBJECT}):
            self._invalidate(directory, name)
        self._replaced(prefix)

    def mark_outdated(self, key: str) -> None:
        """Make the next lookup of an object ask the store: the directory's answer may be outdated."""
        prefix, slash, name = key.rpartition("/")
        directory = self._directories.get(prefix + slash)
        if directory is not None:
            directory.outdated[os.fsencode(name)] = trio.current_time()

    def expire(self, path: str) -> None:
        """Make the next lookup in a directory (with its closing slash) or below it ask the store. Keeps old answers."""
        for prefix, directory in self._directories:
            if is_below(prefix, path):
                directory.expire(trio.current_time())

    def _directory(self, prefix: str) -> Directory:
        directory = self._directories.use(prefix)
        if directory.retry_at - STALE_RETRY_S <= directory.breaker.closed_at:
            directory.retry_at = LONG_AGO  # the failure belonged to an outage that is over
        return directory

    def _exists(self, entry: Entry | None) -> bool:
        return entry is not None and entry is not NonObject.ABSENT

    async def _ask(self, directory: Directory, prefix: str, name: bytes) -> tuple[Entry, float]:
        """Ask the store for one name; if that fails, use an expired answer."""
        asked = trio.current_time()
        stale = None if directory.may_be_outdated(name) else directory.stale(name, self._lifetimes.oldest())
        known = self._exists(stale)
        if known and asked < directory.retry_at and (answer := self._lifetimes.stale(directory, name)) is not None:
            return answer
        if (
            stale is NonObject.ABSENT
            and directory.breaker.failing
            and await directory.breaker.is_silent(ABSENT_AFTER_S)
        ):
            return stale, STALE_RETRY_S
        if directory.large and (answer := await self._listed(directory, prefix, name)) is not None:
            return answer
        try:
            if not directory.may_be_outdated(name):  # else the last answer is wrong, and the store may be back
                directory.raise_recent_failure()
            entry = await self._inquiries.of(prefix).probe(prefix + os.fsdecode(name), patient=not known)
        except StoreError as error:
            if not isinstance(error, StoreAccessError):  # access may be denied to this object alone
                directory.failed(error)
            if (answer := self._lifetimes.stale(directory, name)) is None:
                raise
            return answer
        # What was learnt meanwhile may outdate the answer: nobody keeps it then.
        left = self._lifetimes.of(entry) if asked >= directory.outdated_since(name) else 0.0
        if directory.answered(name, entry, asked):
            self._forget_siblings(prefix)
        self._directories.weigh(prefix)
        return entry, left

    async def _listed(self, directory: Directory, prefix: str, name: bytes) -> tuple[Entry, float] | None:
        """List a large directory once that is worth it. Returns what is then known of a name, else None.

        A single name takes two requests. A listing starts after `worth_listing` names, and ends after twice as many
        pages as names were asked for. This bounds all requests to about twice those of the better way, however many
        names are still to come.
        """
        asked = directory.asked(self._lifetimes.ttl_s)
        if asked < directory.worth_listing or self._lifetimes.usable(directory) or directory.lock.locked():
            return None
        if directory.unlistable is not None:
            return None
        directory.worth_listing = 2 * asked  # a complete listing resets it
        async with directory.lock:
            return await self._refreshed(directory, prefix, name, most=2 * asked)

    async def _refresh(self, directory: Directory, prefix: str, *, most: int, patient: bool) -> None:
        """List a directory of at most *most* pages anew; unless *patient*, without retries. Raises StoreError."""
        if most == PAGES_LIMIT and directory.unlistable is not None:
            raise directory.unlistable.with_traceback(None)
        asked = trio.current_time()
        try:
            directory.raise_recent_failure()
            listed = await self._inquiries.of(prefix).listing(
                prefix, most=most, patient=patient, takes_long=directory.takes_long
            )
        except StoreError as error:
            if directory.complete:
                log.warning("/%s: cannot be listed, serving its last listing: %s", prefix, error)
            directory.failed(error)
            raise
        directory.large = listed.pages > 1 or listed.listing is None
        if listed.listing is None and (listed.problem is not None or most == PAGES_LIMIT):
            problem = listed.problem or f"more than {listed.names} names on {listed.pages} pages: too many to list"
            why = StoreUnavailableError(f"/{prefix}: the listing has no end: {problem}: open its files by name")
            directory.cannot_be_listed(why, max(STALE_RETRY_S, self._lifetimes.ttl_s))
            if most == PAGES_LIMIT:
                raise why
        if listed.listing is not None:
            directory.worth_listing = max(LEAST_ASKED, listed.pages // 2)
            if listed.listing.hidden:
                log.warning(
                    "/%s: %d keys are hidden, as they cannot be file names: rename the objects",
                    prefix,
                    listed.listing.hidden,
                )
            if await directory.relisted(listed.listing, asked):
                self._forget_siblings(prefix)
            self._directories.weigh(prefix)
            if self._kept is not None and not directory.expired:
                self._kept.keep(prefix, directory.entries)
