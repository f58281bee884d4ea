"""Requests to the store for names: with retries where nothing is known, else one attempt with a short timeout."""

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import trio

from trimsfs.errors import (
    BucketNotFoundError,
    ObjectNotFoundError,
    StoreAccessError,
    StoreError,
    StoreUnavailableError,
    TransientStoreError,
)
from trimsfs.namespace.listing import Entry, Listing, NonObject
from trimsfs.stores.base import Page, Paging, Store
from trimsfs.stores.circuit_breaker import CircuitBreaker, as_outage
from trimsfs.types import Generation

T = TypeVar("T")

REST_LIMIT = 100_000
"""Entries requested at once after the first page; a store may return fewer."""
PAGES_LIMIT, ENTRIES_LIMIT = 10_000, 1_000_000
"""A longer listing is abandoned: it could be endless and fill the memory."""
LONG_S = 1.0
"""Seconds after which nobody waits for a listing who wants a single name."""
PATIENCE_S, LONGEST_PATIENCE_S = 1.0, 10.0
"""The timeout of an impatient request at first, and at most: it doubles on failure and follows the store's latency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """Counts of the pages and names of a directory that were read; *listing* is None unless they are all.

    *problem* says why there will never be a last page.
    """

    pages: int
    names: int
    listing: Listing | None
    problem: str | None = None


class Inquiries:
    """Requests to a store for names. *impatient* is the same store without retries, for requests that are not
    ``patient``; the *breaker* hears their outcome."""

    def __init__(self, store: Store, impatient: Store, breaker: CircuitBreaker) -> None:
        self._store = store
        self._impatient = impatient
        self._breaker = breaker
        self._patience_s = PATIENCE_S

    async def listing(
        self, prefix: str, *, most: int, patient: bool, takes_long: Callable[[], None] = lambda: None
    ) -> Listed:
        """List a directory; gives up after *most* pages, or above ENTRIES_LIMIT names. Raises StoreError.

        Calls *takes_long* if there are more pages, and they are not here after LONG_S.
        """
        store = self._store if patient else self._impatient
        paging, began = Paging(), trio.current_time()
        page = await self.answer(f"/{prefix}", partial(store.list_page, prefix), patient=patient)
        failed: StoreError | None = None
        async with trio.open_nursery() as nursery:

            async def look() -> None:
                await trio.sleep_until(began + LONG_S)
                takes_long()

            if page.next_token is not None:
                nursery.start_soon(look)
            try:
                listed = await self._listed(prefix, page, paging, most=most, patient=patient)
            except StoreError as error:
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed
        return listed

    async def _listed(self, prefix: str, page: Page, paging: Paging, *, most: int, patient: bool) -> Listed:
        """The listing that begins with a *page*. Raises StoreError."""
        listing, problem = Listing(prefix), paging.problem(page)
        while (
            problem is None
            and (token := page.next_token) is not None
            and paging.pages < most
            and paging.names <= ENTRIES_LIMIT
        ):
            await listing.add(page)
            page = await self._next_page(prefix, token, patient=patient)
            problem = paging.problem(page)
        if problem is not None or page.next_token is not None:
            return Listed(pages=paging.pages, names=paging.names, listing=None, problem=problem)
        await listing.add(page)
        await listing.put_in_order()
        return Listed(pages=paging.pages, names=paging.names, listing=listing)

    async def _next_page(self, prefix: str, token: str, *, patient: bool) -> Page:
        """A page after the first, with retries: the store has just answered, and one failed request of many must not
        fail them all. Raises StoreError, unless *patient* also after LONGEST_PATIENCE_S."""
        with trio.move_on_after(math.inf if patient else LONGEST_PATIENCE_S):
            return await self._store.list_page(prefix, token=token, limit=REST_LIMIT)
        raise TransientStoreError(f"/{prefix}: no answer within {LONGEST_PATIENCE_S:.0f} s")

    async def answer(self, subject: str, request: Callable[[], Awaitable[T]], *, patient: bool) -> T:
        """The store's answer, within the timeout unless *patient*. Raises StoreError, which names the *subject*."""
        if patient:
            return await request()
        self._breaker.check(subject)
        began = trio.current_time()
        try:
            with trio.move_on_after(self._patience_s):
                answer = await request()
                self._breaker.answered()
                self._patience_s = min(max(PATIENCE_S, 2 * (trio.current_time() - began)), LONGEST_PATIENCE_S)
                return answer
            raise TransientStoreError(f"no answer within {self._patience_s:.0f} s")
        except (TransientStoreError, StoreUnavailableError, BucketNotFoundError) as failure:
            error = as_outage(failure)
            self._patience_s = min(2 * self._patience_s, LONGEST_PATIENCE_S)
            self._breaker.failed(error, began)  # without the subject: the breaker quotes it for others
            if isinstance(error, TransientStoreError):
                raise TransientStoreError(f"{subject}: {error}") from failure
            raise
        except StoreAccessError:
            self._breaker.refused()
            raise
        except StoreError:
            self._breaker.answered()
            raise

    async def probe(self, path: str, *, patient: bool) -> Entry:
        """Ask at once for an object and for anything below its name. A directory or a link wins. Raises StoreError."""
        store, generations = self._store if patient else self._impatient, list[Generation]()
        failed, denied = list[StoreError](), list[StoreAccessError]()
        async with trio.open_nursery() as nursery:

            @contextlib.contextmanager
            def failing() -> Iterator[None]:
                """Collect errors: an exception group of them could include a cancellation."""
                try:
                    yield
                except StoreError as error:
                    failed.append(error)
                    nursery.cancel_scope.cancel()

            async def stat() -> None:
                with failing(), contextlib.suppress(ObjectNotFoundError):
                    try:
                        generation = await self.answer(path, partial(store.stat, path), patient=patient)
                    except StoreAccessError as error:
                        denied.append(error)  # as S3 does for a directory's name, if only some prefixes may be listed
                        return
                    if generation.plausible:
                        generations.append(generation)

            nursery.start_soon(stat)
            with failing():
                below = await self.answer(path, partial(store.list_page, f"{path}/", limit=1), patient=patient)
        if failed:
            raise failed[0]
        if below.symlink is not None and below.symlink.plausible:
            return below.symlink
        if below.exists:
            return NonObject.DIRECTORY
        if denied:
            raise denied[0]
        return generations[0] if generations else NonObject.ABSENT
